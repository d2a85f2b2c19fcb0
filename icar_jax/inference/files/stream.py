"""Embeds a stream of image files: reads and hashes them on threads, routes a few thousand at a time, calls a writer."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from icar_jax import profiling
from icar_jax.checkpoint import CheckpointError
from icar_jax.data.images import Preprocess, decode
from icar_jax.files import limits
from icar_jax.files.opening import read_regular
from icar_jax.inference.budgets import ABOVE_ALL
from icar_jax.inference.fetch_queue import RoutingStats
from icar_jax.inference.model import Model
from icar_jax.inference.router import RoutingResult
from icar_jax.models.reduction.routes import route_name

SCORE = "score"  # batch entry of precomputed complexity


@dataclass(frozen=True)
class ReadImage:
    """An image file that was read, hashed and preprocessed.

    Attributes:
        pixels: uint8 [S, S, 3] by the names of `StreamEncoder.preprocesses`; empty if the file was not decoded.
        seconds: wall time on its thread.
    """

    path: str
    sha256: str
    pixels: Mapping[str, np.ndarray]
    seconds: float


def read_image(path: str, preprocesses: Mapping[str, Preprocess], known: Callable[[str], bool] = lambda _: False) -> ReadImage:
    """Reads, hashes and preprocesses a file, without decoding if `known(sha256)`. Raises OSError and ImageError."""
    start = time.perf_counter()
    content = read_regular(path, limits.IMAGE_BYTES)
    sha256 = hashlib.sha256(content).hexdigest()
    pixels = {}
    if not known(sha256):
        picture = decode(content, path, at_least=max(p.decoded_side for p in preprocesses.values()))
        pixels = {name: p.resize(picture) for name, p in preprocesses.items()}
    return ReadImage(path, sha256, pixels, time.perf_counter() - start)


class StreamEncoder:
    """Embeds batches at one exit, routed by thresholds, or routed by precomputed scores.

    Args:
        exit: executed blocks of every image, without scoring; if None, a bundle routes and a CLIP runs full depth.
        budget: as for `Model.encode_image`; excludes `exit`.
        cheap: a bundle scores every image and runs it to the first exit; excludes `exit` and `budget`.
        known: route by the precomputed entry SCORE of each image; needs a bundle.

    Attributes:
        exit, thresholds: exactly one of them is None.
        preprocesses: preprocessing by the names of a batch's entries.

    Raises ConfigError for a budget that cannot be met, and CheckpointError if the model does not support the request.
    """

    def __init__(
        self, model: Model, *, exit: int | None = None, budget: float | None = None, cheap: bool = False, known: bool = False
    ):
        if sum((exit is not None, budget is not None, cheap)) > 1:
            raise ValueError("exit, budget and a cheap pass exclude each other")
        self.model, self._known = model, known
        natural = model.fixed_exit(exit)
        if (cheap or known) and model.thresholds is None:
            raise CheckpointError(
                f"{model.path} cannot score images, which --pass cheap and --pass refine need; make a bundle with `icar bundle`"
            )
        if cheap:
            self.exit, self.thresholds = None, (ABOVE_ALL,) * (len(model.exits) - 1)
        elif budget is not None:
            self.exit, self.thresholds = None, model.thresholds_for(budget)
        else:
            self.exit = natural
            self.thresholds = model.thresholds if self.exit is None else None
        self.preprocesses = {"clip": model.preprocess} if known or self.exit is not None else model.preprocesses

    def warm_up(self) -> float:
        """Compiles what `embed_batches` runs; returns the seconds it took."""
        start = time.perf_counter()
        if self._known:
            for exit in self.model.exits[1:]:  # no image is refined to the first exit
                self.model.warm_up_embed(exit)
        else:
            self.model.warm_up_embed(self.exit)
        return time.perf_counter() - start

    def embed_batches(self, batches: Iterable[Mapping[str, np.ndarray]]) -> RoutingResult:
        """RoutingResult of all preprocessed batches, in order."""
        if self._known:
            return self.model.embed_known(((b["clip"], b[SCORE]) for b in batches), self.thresholds)
        return self.model.embed(batches, exit=self.exit, thresholds=self.thresholds)

    def describe(self) -> dict[str, Any]:
        """JSON-serialisable settings; for one model, equal settings give equal embeddings."""
        how = {"exit": self.exit} if self.exit is not None else {
            "exits": list(self.model.exits), "thresholds": list(self.thresholds)
        }  # fmt: skip
        return {**how, "dtype": self.model.dtype}


@dataclass
class StreamResult:
    """Results of `embed_stream`: images, images per exit (executed blocks), wall times in s, summed router statistics.

    left_out: report of what walks of folders left out; empty for nothing.
    """

    images: int = 0
    exits: Counter = field(default_factory=Counter)
    warm_up_s: float = 0.0
    seconds: float = 0.0
    stats: RoutingStats = field(default_factory=RoutingStats)
    left_out: str = ""

    def shares(self) -> str:
        """Fraction of images per exit as text, for a progress bar."""
        return ", ".join(
            f"{route_name(depth)} {count / max(1, self.images):.0%}" for depth, count in sorted(self.exits.items())
        )

    def share_exits(self, depths: Sequence[int], counts: Sequence[int]) -> None:
        """Sets the images per exit to counts that were summed over processes."""
        self.exits = Counter({depth: int(count) for depth, count in zip(depths, counts, strict=True) if count})

    def pace(self) -> str:
        """Duration and speed as text, for the first line of a report."""
        speed = f" ({self.images / max(self.seconds, 1e-9):.1f} images/s)" if self.images else ""
        compiled = f", after {self.warm_up_s:.1f} s of compilation" if self.warm_up_s else ""
        return f"{self.seconds:.1f} s{speed}{compiled}"

    def details(self) -> list[str]:
        """Summary lines: fraction of images per exit and time breakdown."""
        s, n = self.stats, max(1, self.images)
        padding = sum(s.padding.values()) / max(1, sum(s.rows.values()) + sum(s.padding.values()))
        share = lambda seconds: f"{100 * seconds / max(s.total_s, 1e-9):.0f}%"
        lines = [f"  {route_name(depth)}: {count:,} images ({count / n:.1%})" for depth, count in sorted(self.exits.items())]
        if self.images:
            lines.append(
                f"  time: towers {share(s.tower_s)}, complexity {share(s.score_s)}, waiting for images {share(s.input_s)}; "
                f"padding {padding:.1%} of tower rows; {s.compilations} compilations after warm-up"
            )
        return lines


def embed_stream(
    encoding: StreamEncoder,
    images: Iterator[ReadImage],
    rows: int,
    write: Callable[[Sequence[ReadImage], RoutingResult], None],
    done: StreamResult,
    compiled: Callable[[], None] = lambda: None,
) -> None:
    """Embeds all images and calls `write` for every `rows` of them, in order, after updating `done`.

    Compiles only if there is an image, then calls `compiled()`, so that a progress bar can exclude compilation.
    Memory: about ten batches of pixels and `rows` embeddings.
    """
    first = next(images, None)
    if first is None:
        return
    with profiling.section("starting"):
        done.warm_up_s += encoding.warm_up()
    compiled()
    images = itertools.chain([first], images)
    while _embed_shard(encoding, images, rows, write, done):
        pass


def _embed_shard(
    encoding: StreamEncoder,
    images: Iterator[ReadImage],
    rows: int,
    write: Callable[[Sequence[ReadImage], RoutingResult], None],
    done: StreamResult,
) -> bool:
    """Embeds and writes the next `rows` images; False if none was left."""
    taken: list[ReadImage] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        while len(taken) < rows:
            batch = list(itertools.islice(images, min(encoding.model.batch_size, rows - len(taken))))
            if not batch:
                return
            # Kept without pixels, which take most of the memory.
            taken.extend(ReadImage(image.path, image.sha256, {}, image.seconds) for image in batch)
            yield {name: np.stack([image.pixels[name] for image in batch]) for name in batch[0].pixels}

    with profiling.section("transfer"):
        routed = encoding.embed_batches(profiling.batches(batches()))
    if not taken:
        return False
    done.images += len(taken)
    done.exits.update(routed.exits.tolist())
    done.stats.add(routed.stats)
    with profiling.section("saving"):
        write(taken, routed)
    return True
