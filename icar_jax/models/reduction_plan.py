"""Towers with token reduction: schedules from a number a block or from a share of FLOPs, and the routes through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from icar_jax.errors import ModelError
from icar_jax.models.flops import vision_flops
from icar_jax.models.reduced_text import PROTECTED
from icar_jax.models.reduction.routes import route
from icar_jax.models.reduction.schedule import WITHIN, Schedule, constant, constant_error, most_removed, stripped
from icar_jax.models.text import TextArch
from icar_jax.models.vision_arch import VisionArch


def reduced_vision(
    arch: VisionArch,
    method: str,
    removed: Schedule = (),
    share: float = 0.0,
    after: int = 0,
    proportional: bool = True,
    shares: Sequence[float] = (),
) -> VisionArch:
    """Returns the tower with a token reduction.

    Args:
        arch: a tower without reduction.
        method: tome | pitome | crossget | drop.
        removed: number of tokens that every block removes, or one for each block; of 'drop' the patches dropped after block
            `after`, or after each.
        share: FLOPs of full depth as a share of those of `arch`; the schedule that just meets it replaces `removed`.
        after: blocks before tokens are removed, which all schedules share; of 'drop' 0 is a third of the depth.
        proportional: as of VisionArch.
        shares: more schedules, as routes beside `arch`'s own exits.

    Raises ModelError for a schedule that is impossible or a share that cannot be met, with the numbers.
    """
    if after >= arch.depth:
        raise ModelError(f"reduce_after={after} leaves none of the {arch.depth} blocks to remove tokens")
    if removed and share:
        raise ModelError(f"reduce_r={removed} and reduce_to={share} both set the schedule; use one of them")
    if method == "drop":
        after = after or max(arch.depth // 3, 1)
    tower = dataclasses.replace(arch, reduce=method, proportional=proportional)
    full = vision_flops(dataclasses.replace(arch, exits=()))
    if share:
        schedule = _solved(tower, share, full, after)
    elif method == "drop" and len(removed) == 1:
        schedule = (0,) * (after - 1) + removed
    elif len(removed) == 1:
        schedule = _constant("reduce_r", removed[0], arch.depth, *_counts(tower), after)
    else:
        schedule = removed
    tower = dataclasses.replace(tower, schedule=stripped(schedule) if len(schedule) <= arch.depth else schedule)
    if not shares:
        return tower
    more = tuple(_solved(tower, each, full, after) for each in shares)
    tower = dataclasses.replace(tower, schedules=more)
    routes = [*tower.exits, *(route(arch.depth, n) for n in range(1, len(more) + 1)), arch.depth]
    cost = {each: vision_flops(dataclasses.replace(tower, routes=(each, arch.depth) if each != arch.depth else (each,)), each)
            for each in routes}  # fmt: skip
    if max(routes, key=cost.__getitem__) != arch.depth:
        dearest = max(cost.values()) / full
        raise ModelError(
            f"reduce_routes={tuple(shares)}: a route costs {dearest:.3f} of full depth, more than the tower's own schedule "
            f"({cost[arch.depth] / full:.3f}), which must be the dearest"
        )
    return dataclasses.replace(tower, routes=tuple(sorted(dict.fromkeys(routes), key=cost.__getitem__)))


def reduced_text(arch: TextArch, removed: Schedule = ()) -> TextArch:
    """Returns the text tower with CrossGET's reduction; `removed` as of `reduced_vision`. Raises ModelError."""
    arch = dataclasses.replace(arch, reduce="crossget")
    one = len(removed) == 1
    schedule = _constant("reduce_text", removed[0], arch.depth, arch.tokens, PROTECTED) if one else removed
    return dataclasses.replace(arch, schedule=schedule)


def _constant(name: str, removed: int, depth: int, tokens: int, protected: int, after: int = 0) -> Schedule:
    if wrong := constant_error(name, removed, depth, tokens, protected, after):
        raise ModelError(wrong)
    return constant(removed, depth, tokens, protected, after)


def _counts(tower: VisionArch) -> tuple[int, int]:
    """(tokens before the first block, those of them that never merge)."""
    return tower.tokens + tower.has_cross, tower.protected + tower.has_cross


def _solved(tower: VisionArch, share: float, full: int, after: int) -> Schedule:
    """The schedule of fewest removed tokens whose FLOPs at full depth are at most `share` of `full`."""
    tower = dataclasses.replace(tower, schedule=(), schedules=(), routes=())
    cost = lambda schedule: vision_flops(dataclasses.replace(tower, schedule=schedule))
    if tower.reduce in WITHIN:
        most = tower.depth * most_removed(*_counts(tower))
        made = lambda total: _even(tower, total, after)
    else:
        most = tower.grid**2 - 1
        made = lambda total: (0,) * (after - 1) + (total,) if total else ()
    low, high = 0, most
    if cost(made(high)) > share * full:
        raise ModelError(
            f"reduce_to={share}: with {tower.reduce!r} the tower costs at least {cost(made(high)) / full:.3f} of its FLOPs; "
            "use a larger share" + (f", or remove tokens earlier than after {after} blocks" if after else "")
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(made(middle)) <= share * full else (middle + 1, high)
    return made(low)


def _even(tower: VisionArch, total: int, after: int) -> Schedule:
    """`total` removed tokens spread evenly over the blocks from `after` on, each block at most what is possible there.

    The first of them remove one more.
    """
    (tokens, protected), schedule = _counts(tower), [0] * after
    for block in range(tower.depth - after):
        wanted = total // (tower.depth - after) + (block < total % (tower.depth - after))
        schedule.append(min(wanted, most_removed(tokens, protected)))
        tokens -= schedule[-1]
    return stripped(schedule)
