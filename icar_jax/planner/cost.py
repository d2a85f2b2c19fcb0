"""Cost of one step of a compiled program: collectives between chips, memory traffic, the compiler's cycle estimates."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from icar_jax.planner.chips import PlanError
from icar_jax.planner.hlo import Computation, Instruction, InstructionRun, Module, Shape

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
_MOVES_NOTHING = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "optimization-barrier", "async-start", "async-update", "async-done", "iota",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step: number of executions, and total bytes sent per chip."""

    kind: str
    count: int
    sent_bytes: int


def collectives(module: Module) -> tuple[Collective, ...]:
    """Returns the collectives of a step by kind, most bytes first.

    Bytes sent per chip in a group of n are those of ring algorithms: (n-1)/n of the whole array for all-gather, reduce-scatter
    and all-to-all, twice that for all-reduce, the array for collective-permute. An asynchronous collective of the TPU compiler
    appears in several fusions (start, overlapped computation, end) with one channel id and counts once. Raises PlanError.
    """
    found: dict[tuple, tuple[int, int]] = {}
    for run in module.runs():
        instruction = run.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        group = _group_size(instruction, module.partitions)
        if group == 1:
            continue
        sent = _sent(kind, sum(run.computation.bytes_of(name) for name in instruction.operands), group)
        key: tuple = (kind, run.computation.name, instruction.name)
        if run.fused and run.computation.name.startswith("all-reduce-scatter"):
            kind, sent = "reduce-scatter", sent // 2  # represented as a fusion of an all-reduce and a slice
            key = (kind, *key[1:])
        elif run.fused:
            key = (kind, *re.findall(r'(?:channel_id=|chain_id=")(\d+)', instruction.attributes), sent)
        times = run.times
        if key in found:  # several fusions of one collective, one perhaps before the loop; or a computation called twice
            times = max(times, found[key][0]) if run.fused else times + found[key][0]
        found[key] = times, sent
    totals: dict[str, list[int]] = {}
    for (kind, *_), (times, sent) in found.items():
        total = totals.setdefault(kind, [0, 0])
        total[0] += times
        total[1] += times * sent
    rows = [Collective(kind, *total) for kind, total in totals.items()]
    return tuple(sorted(rows, key=lambda row: (-row.sent_bytes, row.kind)))


def _sent(kind: str, operand_bytes: int, group: int) -> int:
    match kind:
        case "all-gather":  # the operand is this chip's shard
            return operand_bytes * (group - 1)
        case "collective-permute":
            return operand_bytes
        case "all-reduce":
            return 2 * operand_bytes * (group - 1) // group
    return operand_bytes * (group - 1) // group


def _group_size(instruction: Instruction, partitions: int) -> int:
    """Number of chips in a group. XLA uses three notations: lists of ids, an iota over a grid, axes of a mesh."""
    text = instruction.attributes
    if "source_target_pairs=" in text:
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
        moved = [p for p in re.findall(r"\{?(\d+),(\d+)", pairs[1])] if pairs else []
        return 2 if any(a != b for a, b in moved) else 1
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "replica_groups={}" in text:
        return partitions
    raise PlanError(f"cannot parse the replica groups of a collective: {instruction.name}{text[:200]}")


def memory_traffic(module: Module) -> int:
    """Returns the bytes that a step reads from and writes to a chip's main memory (HBM).

    Counts operands and results of every instruction outside fusions, except those in on-chip memory. A slice counts only the
    slice and an in-place update only the update, also inside fusions: scans read and write their stacked arrays this way.
    """
    return sum(run.times * _moved(run, module) for run in module.runs() if not run.fused)


def cycles(module: Module) -> int:
    """Returns the sum of the TPU compiler's cycle estimates over all instructions; 0 for compilers without estimates.

    Does not include waiting for collectives, and does not account for the overlap of asynchronous instructions.
    """
    total = 0
    for run in module.runs():
        if not run.fused and (estimate := re.search(r'"estimated_cycles":"(\d+)"', run.instruction.attributes)):
            total += run.times * int(estimate[1])
    return total


def kernels_without_estimate(module: Module) -> int:
    """Returns how many Pallas kernels a step runs. The compiler has no estimate for them, so `cycles` leaves them out."""
    return sum(run.times for run in module.runs() if 'custom_call_target="tpu_custom_call"' in run.instruction.attributes)


def _moved(run: InstructionRun, module: Module) -> int:
    instruction, computation = run.instruction, run.computation
    if instruction.opcode in _MOVES_NOTHING or instruction.opcode.endswith("-done"):
        return 0
    read = 0
    for position, name in enumerate(instruction.operands):
        if _in_main(computation.instructions[name].shapes):
            read += _read(instruction, position, computation, module)
    written = _written(instruction, computation, module)
    places = range(len(written))
    if instruction.opcode.endswith("-start"):  # the result is (operand, result, flags); for a copy (result, operand, flags)
        places = range(1) if instruction.opcode == "copy-start" else range(1, 2)
    return read + sum(written[i] for i in places if instruction.shapes[i].main)


def _in_main(shapes: tuple[Shape, ...]) -> bool:
    return any(shape.main for shape in shapes)


def _read(instruction: Instruction, position: int, computation: Computation, module: Module) -> int:
    """Bytes that `instruction` reads from its operand at `position`."""
    whole = computation.bytes_of(instruction.operands[position])
    taken = sum(shape.bytes for shape in instruction.shapes)
    if instruction.opcode in _SLICES:
        return min(whole, taken) if position == 0 else whole
    if instruction.opcode == "slice-start":  # (operand, result, flags)
        return min(whole, instruction.shapes[1].bytes)
    if instruction.opcode == "dynamic-update-slice" and position == 0:
        return 0
    if instruction.opcode == "fusion":
        return sum(_read_inside(module.computations[name], position, module) for name in instruction.called("calls"))
    return whole


def _read_inside(callee: Computation, position: int, module: Module) -> int:
    """Bytes that a fused computation reads from its parameter, followed through bitcasts and inner fusions."""
    if position not in callee.parameters:
        return 0
    parameter = callee.parameters[position]
    total, pending = 0, [parameter]
    while pending:
        name = pending.pop()
        for user in callee.users.get(name, ()):
            if user.opcode == "bitcast":
                pending.append(user.name)
            elif user.opcode != "tuple":
                places = [i for i, operand in enumerate(user.operands) if operand == name]
                total += sum(_read(user, i, callee, module) for i in places)
    return min(total, callee.bytes_of(parameter))


def _written(instruction: Instruction, computation: Computation, module: Module) -> list[int]:
    """Bytes written to each leaf of the result of `instruction`."""
    whole = [shape.bytes for shape in instruction.shapes]
    match instruction.opcode:
        case "dynamic-update-slice":
            return [computation.bytes_of(instruction.operands[1])]
        case "parameter":
            return [0] * len(whole)  # passed through, not written
        case "bitcast" if len(instruction.operands) == 1:
            return _written(computation.instructions[instruction.operands[0]], computation, module)
        case "tuple":
            leaves = [_written(computation.instructions[name], computation, module) for name in instruction.operands]
            return [n for leaf in leaves for n in leaf]
        case "fusion":
            names = instruction.called("calls")
            inner = [n for name in names for n in _written(module.computations[name].root, module.computations[name], module)]
            return inner if len(inner) == len(whole) else whole
    return whole
