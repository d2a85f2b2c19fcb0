"""Towers with token reduction: schedules from a number a block or from a share of FLOPs, and the routes through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from icar_jax.errors import ModelError
from icar_jax.models.flops import vision_flops
from icar_jax.models.reduction.routes import route
from icar_jax.models.reduction.schedule import WITHIN, Schedule, most_removed, stripped
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
        after: of 'drop': blocks before patches are dropped; 0 is a third of the depth.
        proportional: as of VisionArch.
        shares: more schedules, as routes beside `arch`'s own exits.

    Raises ModelError for a schedule that is impossible or a share that cannot be met, with the numbers.
    """
    if removed and share:
        raise ModelError(f"reduce_r={removed} and reduce_to={share} both set the schedule; use one of them")
    after = after or max(arch.depth // 3, 1)
    tower = dataclasses.replace(arch, reduce=method, proportional=proportional)
    full = vision_flops(dataclasses.replace(arch, exits=()))
    if share:
        schedule = _solved(tower, share, full, after)
    elif method == "drop" and len(removed) == 1:
        schedule = (0,) * (after - 1) + removed
    else:
        schedule = removed * arch.depth if len(removed) == 1 else removed
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
    schedule = removed * arch.depth if len(removed) == 1 else removed
    return dataclasses.replace(arch, reduce="crossget", schedule=schedule)


def _solved(tower: VisionArch, share: float, full: int, after: int) -> Schedule:
    """The schedule of fewest removed tokens whose FLOPs at full depth are at most `share` of `full`."""
    tower = dataclasses.replace(tower, schedule=(), schedules=(), routes=())
    cost = lambda schedule: vision_flops(dataclasses.replace(tower, schedule=schedule))
    if tower.reduce in WITHIN:
        most = tower.depth * most_removed(tower.tokens + tower.has_cross, tower.protected + tower.has_cross)
        made = lambda total: _even(tower, total)
    else:
        most = tower.grid**2 - 1
        made = lambda total: (0,) * (after - 1) + (total,) if total else ()
    low, high = 0, most
    if cost(made(high)) > share * full:
        raise ModelError(
            f"reduce_to={share}: with {tower.reduce!r} the tower costs at least {cost(made(high)) / full:.3f} of its FLOPs; "
            "use a larger share" + ("" if tower.reduce in WITHIN else f", or drop earlier than after {after} blocks")
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(made(middle)) <= share * full else (middle + 1, high)
    return made(low)


def _even(tower: VisionArch, total: int) -> Schedule:
    """`total` removed tokens spread evenly, one more in the first blocks, each block at most what is possible there."""
    tokens, protected, schedule = tower.tokens + tower.has_cross, tower.protected + tower.has_cross, []
    for block in range(tower.depth):
        wanted = total // tower.depth + (block < total % tower.depth)
        schedule.append(min(wanted, most_removed(tokens, protected)))
        tokens -= schedule[-1]
    return stripped(schedule)
