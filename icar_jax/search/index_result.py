"""The result of an indexing run and its summary text."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from icar_jax.inference.files.stream import StreamResult
from icar_jax.inference.reading import BadFile

_KEEP_EXITS = (
    "  Unchanged images keep their exits: --budget, --exit and --pass cheap apply only to images embedded in this run. Use "
    "--pass refine, optionally with --budget, to run images deeper, or a new store to embed all images at another budget"
)


@dataclass
class IndexResult(StreamResult):
    """Counts and timings of a run of `index_files`; counts are summed over processes.

    Attributes:
        rerouted: some images were unchanged, but the budget, exit or pass differs from that of the previous run.
        images: images run through the model; exits as in StreamResult; warm_up_s, seconds, stats: of this process.
        added, updated: new paths, and paths with new content; both include `copied`.
        copied: content that the store already contained, such as moved or copied files; not run through the model.
        touched: same content with another modification time. captioned: only the caption changed.
        unchanged: not read, or read and equal. removed: deleted rows of missing files (`prune`); gone: kept ones (without).
        kept: rows that another run added or wrote in the meantime.
        bad, still_bad: unusable files found in this run, and in earlier runs.
        total: images in the store now. duplicates, empty: as in ImagePaths.
    """

    added: int = 0
    updated: int = 0
    copied: int = 0
    touched: int = 0
    captioned: int = 0
    unchanged: int = 0
    removed: int = 0
    gone: int = 0
    kept: int = 0
    rerouted: bool = False
    bad: int = 0
    still_bad: int = 0
    total: int = 0
    first_bad: list[BadFile] = field(default_factory=list)
    duplicates: int = 0
    empty: list[str] = field(default_factory=list)

    def report(self) -> str:
        """Summary text of the run: speed, fraction of images per exit, and counts of files."""
        counts = [f"added {self.added:,}", f"updated {self.updated:,}", f"removed {self.removed:,}",
                  f"unchanged {self.unchanged:,}", f"bad {self.bad + self.still_bad:,}"]  # fmt: skip
        rare = {
            "touched (same content)": self.touched, "new captions": self.captioned, "written by another run": self.kept,
            "rows of missing files (--prune removes them)": self.gone,
        }  # fmt: skip
        counts += [f"{what} {count:,}" for what, count in rare.items() if count]
        copied = f" ({self.copied:,} of them with content that was already embedded)" if self.copied else ""
        return "\n".join(
            [f"Embedded {self.images:,} images in {self.pace()}", *self.details(),
             f"  {', '.join(counts)}{copied}", *([_KEEP_EXITS] if self.rerouted else [])]
        )  # fmt: skip


SUMMED = tuple(f.name for f in fields(IndexResult) if f.type in (int, "int") and f.name != "total")
