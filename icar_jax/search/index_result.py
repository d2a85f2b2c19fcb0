"""What a run of indexing did, and how it is told."""

from dataclasses import dataclass, field, fields

from icar_jax.inference.files.stream import StreamResult
from icar_jax.inference.reading import BadFile

_KEEP_EXITS = (
    "  Unchanged images keep their exits: --budget, --exit and --pass cheap are for what is embedded now. --pass refine runs "
    "deeper what needs it, with --budget as well; a new store holds all images at another budget"
)


@dataclass
class IndexResult(StreamResult):
    """What a run of `index_files` did, summed over its processes.

    Attributes:
        rerouted: images were unchanged, and another budget, exit or pass was asked for than the last ones were embedded with.
        images: run through the model; exits, warm_up_s, seconds, stats: as of Embedding, of this process.
        added, updated: paths that are new to the store, or whose content changed; whether or not the model had to run.
        copied: of these, content that the store held already: files moved or copied.
        touched: content unchanged, but not the modified time. captioned: only the caption changed.
        unchanged: not read, or read and found equal. removed: rows of vanished files, with `prune`; gone: without.
        kept: rows that another run had written meanwhile. bad, still_bad: files that cannot be used, found now or before.
        total: images in the store now. duplicates, empty: as of ImagePaths.
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
        """Text for the end of a run: speed, shares, and what became of the files."""
        counts = [f"added {self.added:,}", f"updated {self.updated:,}", f"removed {self.removed:,}",
                  f"unchanged {self.unchanged:,}", f"bad {self.bad + self.still_bad:,}"]  # fmt: skip
        rare = {
            "touched (same content)": self.touched, "new captions": self.captioned, "written by another run": self.kept,
            "vanished files whose rows stay (--prune removes them)": self.gone,
        }  # fmt: skip
        counts += [f"{what} {count:,}" for what, count in rare.items() if count]
        copied = f" ({self.copied:,} of them had content that was embedded already)" if self.copied else ""
        return "\n".join(
            [f"Embedded {self.images:,} images in {self.pace()}", *self.details(),
             f"  {', '.join(counts)}{copied}", *([_KEEP_EXITS] if self.rerouted else [])]
        )  # fmt: skip


SUMMED = tuple(f.name for f in fields(IndexResult) if f.type == "int" and f.name != "total")
