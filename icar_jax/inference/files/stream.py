"""Files into embeddings: read and hashed on threads, routed a few thousand at a time, and handed to whoever keeps them."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from icar_jax.checkpoint import CheckpointError
from icar_jax.data.images import Preprocess, decode
from icar_jax.inference.budgets import ABOVE_ALL
from icar_jax.inference.fetch_queue import Stats
from icar_jax.inference.model import Model
from icar_jax.inference.router import RoutingResult

SCORE = "score"  # entry of a batch: complexity that is known already


@dataclass(frozen=True)
class ReadImage:
    """A file that was read: `seconds` of wall time on its thread.

    Attributes:
        pixels: by the names of `Encoding.preprocesses`, uint8 [S, S, 3]; empty where `read_image` was told not to decode.
    """

    path: str
    sha256: str
    pixels: Mapping[str, np.ndarray]
    seconds: float


def read_image(path: str, preprocesses: Mapping[str, Preprocess], known: Callable[[str], bool] = lambda _: False) -> ReadImage:
    """Reads, hashes and prepares a file; one whose hash is `known` is not decoded. Raises OSError and ImageError."""
    start = time.perf_counter()
    content = Path(path).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    pixels = {}
    if not known(sha256):
        picture = decode(content, path)
        pixels = {name: p.resize(picture) for name, p in preprocesses.items()}
    return ReadImage(path, sha256, pixels, time.perf_counter() - start)


class StreamEncoder:
    """How a run embeds its images: routed by a bundle's thresholds or by others, all at one exit, or by scores known before.

    Args:
        exit: executed blocks for every image, none is scored; without it a bundle routes, and a CLIP runs full depth.
        budget: as for `Model.encode_image`; excludes `exit`.
        cheap: a bundle scores every image, and runs it at its first exit only; excludes both.
        known: images come with the entry SCORE in their pixels, and are routed by it. Needs a bundle.

    Attributes:
        exit, thresholds: one of them is None.
        preprocesses: how images are prepared, by the names of a batch's entries.

    Raises ConfigError for a budget that cannot be met, CheckpointError for a model that cannot do it.
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
                f"{model.path} cannot score images, as passes over a collection need; make a bundle with `icar bundle`"
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
        """Compiles what `embed` runs; returns the seconds it took."""
        start = time.perf_counter()
        if self._known:
            for exit in self.model.exits[1:]:  # what is known to belong at the first exit is there
                self.model.warm_up_embed(exit)
        else:
            self.model.warm_up_embed(self.exit)
        return time.perf_counter() - start

    def embed(self, batches: Iterable[Mapping[str, np.ndarray]]) -> RoutingResult:
        """Batches of prepared images -> Routed over all of them, in order."""
        if self._known:
            return self.model.embed_known(((b["clip"], b[SCORE]) for b in batches), self.thresholds)
        return self.model.embed(batches, exit=self.exit, thresholds=self.thresholds)

    def describe(self) -> dict[str, Any]:
        """JSON-ready; equal ones of one model give equal embeddings."""
        how = {"exit": self.exit} if self.exit is not None else {
            "exits": list(self.model.exits), "thresholds": list(self.thresholds)
        }  # fmt: skip
        return {**how, "dtype": self.model.dtype}


@dataclass
class StreamResult:
    """What a run of `embed_stream` did: images, executed blocks -> images, wall time, sums of the router's."""

    images: int = 0
    exits: Counter = field(default_factory=Counter)
    warm_up_s: float = 0.0
    seconds: float = 0.0
    stats: Stats = field(default_factory=Stats)

    def shares(self) -> str:
        """Share of each exit, for a progress bar."""
        return ", ".join(f"{depth} blocks {count / max(1, self.images):.0%}" for depth, count in sorted(self.exits.items()))

    def share_exits(self, depths: Sequence[int], counts: Sequence[int]) -> None:
        """Takes over images per exit that were summed over processes."""
        self.exits = Counter({depth: int(count) for depth, count in zip(depths, counts, strict=True) if count})

    def pace(self) -> str:
        """How long it took, for the first line of a report."""
        speed = f" ({self.images / max(self.seconds, 1e-9):.1f} images/s)" if self.images else ""
        compiled = f", after {self.warm_up_s:.1f} s of compilation" if self.warm_up_s else ""
        return f"{self.seconds:.1f} s{speed}{compiled}"

    def details(self) -> list[str]:
        """Lines for the end of a run: shares of the exits, and where the time went."""
        s, n = self.stats, max(1, self.images)
        padding = sum(s.padding.values()) / max(1, sum(s.rows.values()) + sum(s.padding.values()))
        share = lambda seconds: f"{100 * seconds / max(s.total_s, 1e-9):.0f}%"
        lines = [f"  {depth} blocks: {count:,} images ({count / n:.1%})" for depth, count in sorted(self.exits.items())]
        if self.images:
            lines.append(
                f"  towers {share(s.tower_s)} of the time, complexity {share(s.score_s)}, waiting for images "
                f"{share(s.input_s)}; padding {padding:.1%} of the towers' rows; {s.compilations} compilations after warm-up"
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
    """Embeds all images and calls `write` for every `rows` of them, in their order; `done` is brought up to date before.

    Nothing is compiled where no image comes; `compiled()` is called after that, so that a progress bar can leave it out.
    Some ten batches of pixels are held, and beyond them `rows` embeddings.
    """
    first = next(images, None)
    if first is None:
        return
    done.warm_up_s += encoding.warm_up()
    compiled()
    images = itertools.chain([first], images)
    while _shard(encoding, images, rows, write, done):
        pass


def _shard(
    encoding: StreamEncoder,
    images: Iterator[ReadImage],
    rows: int,
    write: Callable[[Sequence[ReadImage], RoutingResult], None],
    done: StreamResult,
) -> bool:
    """The next `rows` images; False where none was left."""
    taken: list[ReadImage] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        while len(taken) < rows:
            batch = list(itertools.islice(images, min(encoding.model.batch_size, rows - len(taken))))
            if not batch:
                return
            # What was read is kept without its pixels: they would be most of the memory.
            taken.extend(ReadImage(image.path, image.sha256, {}, image.seconds) for image in batch)
            yield {name: np.stack([image.pixels[name] for image in batch]) for name in batch[0].pixels}

    routed = encoding.embed(batches())
    if not taken:
        return False
    done.images += len(taken)
    done.exits.update(routed.exits.tolist())
    done.stats.add(routed.stats)
    write(taken, routed)
    return True
