"""Routes: pairs of executed blocks and a schedule of token reduction, as numbers that stand where an exit stands.

Schedule 0 of a route is the tower's own, so a route of it is the number of blocks, as of an exit of a tower without routes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

MOST_BLOCKS = 1000  # route = blocks + MOST_BLOCKS * schedule


def route(blocks: int, schedule: int = 0) -> int:
    """Returns the route of so many executed blocks and the number of a schedule."""
    return blocks + MOST_BLOCKS * schedule


def split_route(exit: int) -> tuple[int, int]:
    """Returns (executed blocks, number of the schedule) of a route."""
    number, blocks = divmod(exit, MOST_BLOCKS)
    return blocks, number


def in_cost_order(exits: Iterable[int]) -> tuple[int, ...]:
    """Returns exits ascending in cost: ascending depths, or the given order, that of `VisionArch.all_exits`, of routes."""
    given = tuple(exits)
    return given if any(exit >= MOST_BLOCKS for exit in given) else tuple(sorted(given))


def route_name(exit: int) -> str:
    """Returns a route for people: '12 blocks', or '12 blocks, schedule 2'."""
    blocks, number = split_route(exit)
    return f"{blocks} blocks" + (f", schedule {number}" if number else "")


def route_errors(routes: tuple[int, ...], depths: tuple[int, ...], schedules: int) -> Iterator[str]:
    """Yields why the routes of a tower are invalid, which has heads at `depths` and so many schedules besides its own."""
    if len(set(routes)) != len(routes):
        yield f"routes {routes} must differ"
    for each in routes:
        blocks, number = split_route(each)
        if blocks not in depths or not 0 <= number <= schedules:
            yield (
                f"route {each} asks for {route_name(each)}; this tower has exits after {depths} blocks and schedules 0 to "
                f"{schedules}"
            )
    if routes and routes[-1] != depths[-1]:
        yield f"routes {routes} must end with {depths[-1]}, full depth with the tower's own schedule, the dearest"
