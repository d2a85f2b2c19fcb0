"""The architecture of a vision tower, and which of its fields contradict each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from icar_jax.errors import ModelError
from icar_jax.models.exit_heads import EXIT_HEADS
from icar_jax.models.projection import projection_error
from icar_jax.models.reduction.routes import route_errors, split_route
from icar_jax.models.reduction.schedule import REDUCTIONS, WITHIN, Schedule, drop_error, schedule_error, stripped
from icar_jax.models.reduction.similar import merging_error
from icar_jax.models.sizes import size_error

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
    head_blocks: int = 1  # every head reads the pooled tokens of the last `head_blocks` blocks up to it, concatenated
    reduce: str = "none"  # token reduction: none | tome | pitome | crossget | drop (models/reduction)
    schedule: Schedule = ()  # entry i: number of tokens that block i + 1 merges, or that are dropped after it
    proportional: bool = True  # whether attention is proportional to the sizes of merged tokens
    schedules: tuple[Schedule, ...] = ()  # more schedules of the same weights; schedule n is the nth of them, 0 is `schedule`
    routes: tuple[int, ...] = ()  # pairs of blocks and schedule (reduction/routes.py), ascending in cost; empty: the exits

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", tuple(tuple(each) for each in self.schedules))  # JSON has lists
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
    def reads_pooled(self) -> bool:
        """Whether every head reads nothing but pooled tokens, so that outputs of a frozen tower can be kept."""
        return "map" not in (self.head, self.pool if self.exits else "") and (self.exit_head == "linear" or not self.exits)

    @property
    def pooled_width(self) -> int:
        """Channels that the projection of a head reads: all its pooled tokens."""
        return self.width * self.parts * self.head_blocks

    @property
    def parts(self) -> int:
        """Number of pooled tokens that a head reads of a block: 2 for 'cls_mean', the class token and the mean."""
        return 2 if self.head == "cls_mean" else 1

    def blocks_of(self, depth: int) -> tuple[int, ...]:
        """Returns the numbers of blocks after which the head at that depth reads tokens, ascending; `depth` is the last."""
        return tuple(range(depth - self.head_blocks + 1, depth + 1))

    @property
    def read_blocks(self) -> tuple[int, ...]:
        """Numbers of blocks after which any head reads tokens, ascending."""
        return tuple(sorted({block for depth in self.depths for block in self.blocks_of(depth)}))

    @property
    def has_cross(self) -> bool:
        """Whether a cross token follows the patches (CrossGET)."""
        return self.reduce == "crossget"

    @property
    def protected(self) -> int:
        """Number of first tokens that are never merged: class token, registers, and the patch that an exit pools."""
        return self.prefix + (self.pool == "first_patch" and bool(self.exits))

    @property
    def removed(self) -> Schedule:
        """Entry i: number of tokens removed in block i + 1, or after it; see `merges_within`."""
        return self.merge or self.schedule

    @property
    def merges_within(self) -> bool:
        """Whether tokens are removed within a block, so that a head after it reads what is left; else after it."""
        return self.reduce in WITHIN

    def tokens_after(self, blocks_run: int) -> int:
        """Returns the sequence length at a head after `blocks_run` blocks.

        Heads read tokens before a merging or dropping after their block.
        """
        done = blocks_run if self.merges_within else max(blocks_run - 1, 0)
        return self.tokens + self.has_cross - sum(self.removed[:done])

    @property
    def first_merging(self) -> int:
        """Number of blocks after which the tokens are still those before the first merging; the depth if there is none."""
        first = next((i for i, count in enumerate(self.removed, 1) if count), None)
        return self.depth if first is None else first - self.merges_within

    def reduction_until(self, blocks_run: int) -> dict[str, Schedule]:
        """Returns the fields `merge` and `schedule` that affect tokens read after `blocks_run` blocks."""
        return {"merge": stripped(self.merge[: blocks_run - 1]), "schedule": stripped(self.schedule[:blocks_run])}

    @property
    def exits_after_merging(self) -> tuple[int, ...]:
        """Early exits after the first merging; their heads read merged or fewer patches."""
        return tuple(e for e in self.exits if e > self.first_merging)

    @property
    def depths(self) -> tuple[int, ...]:
        """All depths with a head, ascending; full depth is last."""
        return (*self.exits, self.depth)

    @property
    def all_exits(self) -> tuple[int, ...]:
        """All exits, ascending in cost; full depth is last. They are depths, or `routes` where the tower has these."""
        return self.routes or self.depths

    def at_route(self, exit: int) -> tuple[VisionArch, int]:
        """Returns (the architecture with the schedule of that exit as its only one, executed blocks)."""
        blocks_run, number = split_route(exit)
        return self.with_schedule(number), blocks_run

    def with_schedule(self, number: int) -> VisionArch:
        """Returns the architecture with that schedule (0 is `schedule`, n the nth of `schedules`) as its only one."""
        if not (self.schedules or self.routes):
            return self
        schedule = self.schedules[number - 1] if number else self.schedule
        return dataclasses.replace(self, schedule=schedule, schedules=(), routes=())

    def heads_of(self, blocks_run: int) -> tuple[int, ...]:
        """Returns the depths of the heads that the embedding after `blocks_run` blocks uses, ascending; see `exit_sum`."""
        return tuple(e for e in self.depths if e <= blocks_run) if self.exit_sum else (blocks_run,)

    def check_exit(self, exit: int | None) -> int:
        """Returns `exit`, or the depth if it is None. Raises ModelError if there is no head after `exit` blocks."""
        if exit is None:
            return self.depth
        if exit not in self.all_exits:
            raise ModelError(f"exit={exit} has no head; this model has exits after {self.all_exits} blocks")
        return exit


def _errors(a: VisionArch) -> Iterator[str]:
    """What is wrong with an architecture; later checks rely on earlier ones."""
    if wrong := size_error(a):
        yield wrong
    if a.image_size % a.patch_size:
        yield f"image size {a.image_size} is not a multiple of the patch size {a.patch_size}"
    if list(a.exits) != sorted(set(a.exits)) or any(not 1 <= e < a.depth for e in a.exits):
        yield f"exits {a.exits} must be ascending block counts from 1 to {a.depth - 1}"
    if wrong := merging_error(a.merge, a.depth, a.grid**2):
        yield wrong
    yield from _reduction_errors(a)
    if a.pool == "first_patch" and not a.merges_within and (late := a.exits_after_merging):
        what = f"dropping patches {a.schedule}" if a.schedule else f"token merging {a.merge}"
        yield f"pool {a.pool!r} does not work at exits {late} after {what}; use 'cls' or 'mean'"
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


def _reduction_errors(a: VisionArch) -> Iterator[str]:
    if a.reduce not in REDUCTIONS:
        yield f"reduce {a.reduce!r} must be one of {REDUCTIONS}"
    if a.reduce == "none" and (a.schedule or a.schedules):
        yield f"schedule={a.schedule or a.schedules[0]} needs a reduction, one of {REDUCTIONS[1:]}; 'none' removes no tokens"
    if a.reduce != "none" and a.merge:
        yield f"merge={a.merge} and reduce={a.reduce!r} both remove tokens; use one of them"
    if a.reduce in ("crossget", "drop") and not a.class_token:
        yield f"reduce {a.reduce!r} is guided by the class token, and this tower has none; use 'tome' or 'pitome'"
    for number, schedule in enumerate((a.schedule, *a.schedules)):
        name = f"schedules[{number - 1}]" if number else "schedule"
        if a.reduce == "drop":
            wrong = drop_error(name, schedule, a.depth, a.grid**2)
        else:
            wrong = schedule_error(name, schedule, a.depth, a.tokens + a.has_cross, a.protected + a.has_cross)
        if wrong:
            yield wrong
    yield from route_errors(a.routes, a.depths, len(a.schedules))


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
    if not 1 <= a.head_blocks <= min(a.depths):
        yield (
            f"head_blocks={a.head_blocks} must lie in 1 to {min(a.depths)}, the number of blocks before the first head"
            + (": use fewer, or later exits" if a.exits else "")
        )
    if a.head_blocks > 1 and (a.head == "map" or a.projection == "none" or a.exit_head != "linear"):
        other = "an attention-pool head" if a.head == "map" else "a head without projection"
        other = other if a.exit_head == "linear" else f"exit head {a.exit_head!r}"
        yield f"head_blocks={a.head_blocks} concatenates the pooled tokens of blocks and projects them, {other} does not; use 1"
    if a.head_blocks > 1 and a.exits and a.pool != a.head:
        yield f"head_blocks={a.head_blocks} needs one pooling of all heads, but exits pool {a.pool!r} and full depth {a.head!r}"
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
