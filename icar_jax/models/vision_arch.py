"""The architecture of a vision tower, and which of its fields contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from icar_jax.errors import ModelError
from icar_jax.models.exit_heads import EXIT_HEADS
from icar_jax.models.projection import projection_error
from icar_jax.models.token_merging import merging_error

POOLS = ("cls", "mean", "first_patch", "map", "cls_mean")
HEADS = ("cls", "map", "mean", "cls_mean")
FFNS = ("mlp", "swiglu")
EXIT_FIELDS = ("exits", "pool", "exit_head", "exit_sum", "exit_eps")  # of VisionArch: those that concern early exits alone


@dataclass(frozen=True)
class VisionArch:
    """Architecture of a vision tower; sizes in pixels, widths in channels. Raises ModelError for invalid combinations.

    Pooling comes before the LayerNorm of a head. 'mean' averages the patches, without class token and registers, weighted by
    the sizes of merged patches. 'cls_mean' normalises class token and mean with the same LayerNorm and concatenates them.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int  # hidden channels of the feed-forward part
    embed_dim: int
    activation: str = "gelu"  # gelu | gelu_tanh | quick_gelu
    exits: tuple[int, ...] = ()  # executed blocks, ascending, below depth
    pool: str = "cls"  # pooling at the exits: cls | mean | first_patch | map (attention pool) | cls_mean
    head: str = "cls"  # pooling at full depth: cls | mean | cls_mean | map (attention pool without projection, SigLIP)
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: bool = True
    norm_eps: float = 1e-5  # epsilon of the tower's LayerNorms
    exit_head: str = "linear"  # residual module of exit heads: linear (none) | adapter | attention (exit_heads.py)
    exit_sum: bool = False  # whether an embedding is the sum of all heads up to its depth instead of its own head alone
    merge: tuple[int, ...] = ()  # entry i: number of patches merged after i + 1 blocks; shorter than the depth
    registers: int = 0  # tokens after the class token, without position embeddings
    ffn: str = "mlp"  # mlp | swiglu (silu(a) b, a and b the halves of one product)
    projection: str = "linear"  # of every head: linear | linear_mlp (sum of both) | mlp | none (a bare tower)
    projection_width: int = 0  # hidden channels of the projection's MLP
    exit_eps: float = 1e-5  # epsilon of the LayerNorms of exit heads without attention pool

    def __post_init__(self) -> None:
        if error := next(_errors(self), None):
            raise ModelError(error)

    @property
    def grid(self) -> int:
        """Number of patches per side."""
        return self.image_size // self.patch_size

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: class token and registers."""
        return int(self.class_token) + self.registers

    @property
    def tokens(self) -> int:
        """Sequence length before merging: class token, registers and patches."""
        return self.grid**2 + self.prefix

    @property
    def pooled_width(self) -> int:
        """Channels of a pooled token, which the projection reads."""
        return self.width * (2 if self.head == "cls_mean" else 1)

    def tokens_after(self, blocks_run: int) -> int:
        """Returns the sequence length at a head after `blocks_run` blocks; heads read tokens before the merging there."""
        return self.tokens - sum(self.merge[: max(blocks_run - 1, 0)])

    @property
    def first_merging(self) -> int:
        """Number of blocks before the first merging; the depth if there is none."""
        return next((i for i, count in enumerate(self.merge, 1) if count), self.depth)

    def merge_before(self, blocks_run: int) -> tuple[int, ...]:
        """Returns the part of `merge` that affects tokens read after `blocks_run` blocks, without trailing zeros."""
        before = self.merge[: blocks_run - 1]
        return before[: max((i for i, count in enumerate(before, 1) if count), default=0)]

    @property
    def exits_after_merging(self) -> tuple[int, ...]:
        """Early exits after the first merging; their heads read merged patches."""
        return tuple(e for e in self.exits if e > self.first_merging)

    @property
    def all_exits(self) -> tuple[int, ...]:
        """All depths with a head, ascending; full depth is last."""
        return (*self.exits, self.depth)

    def heads_of(self, blocks_run: int) -> tuple[int, ...]:
        """Returns the depths of the heads that the embedding after `blocks_run` blocks uses, ascending; see `exit_sum`."""
        return tuple(e for e in self.all_exits if e <= blocks_run) if self.exit_sum else (blocks_run,)

    def check_exit(self, exit: int | None) -> int:
        """Returns `exit`, or the depth if it is None. Raises ModelError if there is no head after `exit` blocks."""
        if exit is None:
            return self.depth
        if exit not in self.all_exits:
            raise ModelError(f"exit={exit} has no head; this model has exits after {self.all_exits} blocks")
        return exit


def _errors(a: VisionArch) -> Iterator[str]:
    """What is wrong with an architecture; later checks rely on earlier ones."""
    if a.image_size % a.patch_size:
        yield f"image size {a.image_size} is not a multiple of the patch size {a.patch_size}"
    if list(a.exits) != sorted(set(a.exits)) or any(not 1 <= e < a.depth for e in a.exits):
        yield f"exits {a.exits} must be ascending block counts from 1 to {a.depth - 1}"
    if wrong := merging_error(a.merge, a.depth, a.grid**2):
        yield wrong
    if a.pool == "first_patch" and (late := a.exits_after_merging):
        yield f"pool {a.pool!r} does not work at exits {late} after token merging {a.merge}; use 'cls' or 'mean'"
    if a.pool not in POOLS or a.head not in HEADS:
        yield f"pool {a.pool!r} must be one of {POOLS} and head {a.head!r} one of {HEADS}"
    if a.exit_head not in EXIT_HEADS:
        yield f"exit head {a.exit_head!r} must be one of {EXIT_HEADS}"
    if a.ffn not in FFNS:
        yield f"ffn {a.ffn!r} must be one of {FFNS}"
    if a.registers < 0:
        yield f"registers={a.registers} must be a number of tokens, 0 for none"
    for pool in (a.head, *((a.pool,) if a.exits else ())):
        if not a.class_token and pool in ("cls", "cls_mean"):
            yield f"a tower without a class token cannot pool {pool!r}"
    yield from _head_errors(a)


def _head_errors(a: VisionArch) -> Iterator[str]:
    if a.head == "map":
        if a.embed_dim != a.width or (a.exits and a.pool != "map"):
            yield (
                f"an attention-pool head has no projection: embed_dim {a.embed_dim} must be the width {a.width}, "
                f"and exits pool 'map', not {a.pool!r}"
            )
        if a.projection != "linear" or a.projection_width:
            yield f"an attention-pool head has no projection; leave projection {a.projection!r} at 'linear', its default"
    elif wrong := projection_error(a.projection, a.projection_width, a.pooled_width, a.embed_dim):
        yield wrong
    if a.exit_sum and (a.head == "map" or a.projection == "none"):
        without = "a tower with an attention-pool head" if a.head == "map" else "a tower with projection 'none'"
        yield f"exit_sum sums projections, but {without} has no projection"
    if a.pool in ("map", "cls_mean") and a.exits and a.exit_head != "linear":
        yield f"exits that pool {a.pool!r} need exit head 'linear', got {a.exit_head!r}"
    if a.head != "map" and a.pool == "map":
        yield "pool 'map' needs head 'map': exit heads are initialised from the full-depth head"
    if a.exits and (a.head == "cls_mean") != (a.pool == "cls_mean"):
        yield (
            f"exits that pool {a.pool!r} read another number of channels than head {a.head!r}, from which they are "
            "initialised; use 'cls_mean' for both or for neither"
        )
