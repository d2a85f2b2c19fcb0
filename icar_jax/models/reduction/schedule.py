"""Schedules: how many tokens each block of a tower removes, and which schedules are possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from icar_jax.config.choices import ReductionName

REDUCTIONS = get_args(ReductionName)
WITHIN = ("tome", "pitome", "crossget")  # merge between attention and MLP of a block; 'drop' removes tokens after one
Schedule = tuple[int, ...]


def most_removed(tokens: int, protected: int) -> int:
    """Returns how many of `tokens` one block can merge: half of those that are not protected."""
    return max((tokens - protected) // 2, 0)


def constant(removed: int, depth: int, tokens: int, protected: int, after: int = 0) -> Schedule:
    """Returns the schedule of `removed` tokens a block after the first `after`, as the published codes cap it.

    Each block removes at most what is possible there.
    """
    schedule = [0] * after
    for _ in range(depth - after):
        schedule.append(min(removed, most_removed(tokens, protected)))
        tokens -= schedule[-1]
    return stripped(schedule)


def constant_error(name: str, removed: int, depth: int, tokens: int, protected: int, after: int = 0) -> str | None:
    """Returns why `removed` tokens a block are more than the tower has, with the numbers; None if they are not.

    The cap of `constant` may still apply to the last blocks, as in CrossGET's own ViT-B/16 with 16 tokens a block.
    """
    blocks, free = depth - after, tokens - protected
    if 0 <= removed * blocks <= free:
        return None
    return (
        f"{name}={removed} in each of {blocks} blocks asks for {removed * blocks} tokens, and {free} of {tokens} can merge "
        f"({protected} are protected); use 0 to {free // blocks}, or a number for each block"
    )


def stripped(schedule: Sequence[int]) -> Schedule:
    """Returns the schedule without trailing zeros."""
    return tuple(schedule[: max((i for i, count in enumerate(schedule, 1) if count), default=0)])


def schedule_error(name: str, schedule: Schedule, depth: int, tokens: int, protected: int) -> str | None:
    """Returns why a schedule of merging within blocks is impossible, with the numbers; None if it is possible.

    `tokens` are those before the first block, `protected` those of them that are never merged.
    """
    if len(schedule) > depth:
        return f"{name}={schedule} has {len(schedule)} entries, but the tower has {depth} blocks"
    for block, count in enumerate(schedule, 1):
        most = most_removed(tokens, protected)
        if not 0 <= count <= most:
            return (
                f"{name}={schedule}: block {block} has {tokens} tokens, {protected} of them protected, and can merge 0 to "
                f"{most} of them, not {count}"
            )
        tokens -= count
    return None


def drop_error(name: str, schedule: Schedule, depth: int, patches: int) -> str | None:
    """Returns why a schedule of dropped patches is impossible, with the numbers; None if it is possible."""
    if len(schedule) >= depth:
        return (
            f"{name}={schedule} has {len(schedule)} entries, but patches can be dropped after at most {depth - 1} of "
            f"{depth} blocks"
        )
    for block, count in enumerate(schedule, 1):
        if not 0 <= count < patches:
            return f"{name}={schedule}: after block {block} there are {patches} patches, and 0 to {patches - 1} can be dropped"
        patches -= count
    return None
