"""What could not be read while batches were made: files that do not decode, and reads of shards that were tried again."""

from __future__ import annotations

from absl import logging

from icar_jax.data.loader.iterator import Batch


class BadFiles:
    """Collects the `bad` and `retried` entries of batches; logs each file once and counts every occurrence.

    Attributes:
        reasons: file name -> reason, in order of first appearance.
        count: number of failed decodings, including repeated ones.
        retried: shard -> number of retried reads.
        retry_reasons: shard -> reason of its last retry.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.count = 0
        self.retried: dict[str, int] = {}
        self.retry_reasons: dict[str, str] = {}

    def __bool__(self) -> bool:
        """Returns whether there is anything to report."""
        return bool(self.reasons or self.retried)

    def add(self, batch: Batch) -> None:
        """Adds the entries of one batch."""
        for name, reason in batch["bad"]:
            self.count += 1
            if name not in self.reasons:
                self.reasons[name] = reason
                logging.warning("Unreadable image, %s", with_name(name, reason))
        for shard, reason in batch["retried"]:
            if shard not in self.retried:
                logging.warning("Retried a failed read, %s", with_name(shard, reason))
            self.retried[shard] = self.retried.get(shard, 0) + 1
            self.retry_reasons[shard] = reason

    def summary(self, shown: int = 20) -> str:
        """Returns a summary for the end of a run: numbers of files and shards, and the first names with reasons."""
        parts = ["All images were readable."] if not self.reasons else []
        if self.reasons:
            parts.append(f"{len(self.reasons)} unreadable image files ({self.count} failed decodings):")
            parts += _listed([with_name(*item) for item in self.reasons.items()], shown)
        if self.retried:
            parts.append(f"{len(self.retried)} shards had failed reads that were retried ({sum(self.retried.values())} times):")
            parts += _listed([f"{s}: {n} times, last {self.retry_reasons[s]}" for s, n in self.retried.items()], shown)
        return "\n".join(parts)


def _listed(lines: list[str], shown: int) -> list[str]:
    more = [f"  and {len(lines) - shown} more"] if len(lines) > shown else []
    return [f"  {line}" for line in lines[:shown]] + more


def with_name(name: str, reason: str) -> str:
    """Returns the reason, preceded by the name where it does not contain it."""
    return reason if name in reason else f"{name}: {reason}"
