"""Prometheus metrics of the server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PARTS = ("queue", "decode", "encode", "search", "total")
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """Metrics of one server in a separate registry."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "icar_requests", "Requests answered, by route and status", ("route", "method", "status"), registry=registry
        )
        self.refused = Counter("icar_refused", "Requests refused, by reason", ("reason",), registry=registry)
        self.latency = Histogram(
            "icar_search_seconds", "Seconds of a search by part, by kind of query", ("kind", "part"), registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self.preview = Histogram("icar_preview_seconds", "Seconds to make a preview", registry=registry, buckets=_SECONDS)
        self.batch = Histogram(
            "icar_batch_queries", "Queries encoded together", ("kind",), registry=registry, buckets=(1, 2, 4, 8, 16, 32)
        )
        self.compilations = Counter("icar_compilations", "Programs compiled after warm-up; expected to be 0", registry=registry)

    def gauge(self, name: str, says: str, value: Callable[[], float]) -> None:
        """Adds a gauge whose value is computed on each scrape; `says` is its description."""
        Gauge(name, says, registry=self._registry).set_function(value)

    def observe_search(self, kind: str, seconds: dict[str, float]) -> None:
        """Records the latency in seconds of each part of a search."""
        for part, value in seconds.items():
            self.latency.labels(kind, part).observe(value)

    def text(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self._registry)
