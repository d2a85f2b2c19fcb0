"""Parses the HLO text of a compiled program: computations, instructions, loops, and how often each instruction runs.

XLA's cost analysis counts a loop body once. Here every instruction is multiplied by the trip counts of the loops around it, so
a program that scans over blocks is counted like an unrolled one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from icar_jax.planner.chips import PlanError

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # names of other types contain their bits: bf16, s4, f8e4m3fn, c64
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Shape:
    """One array: its size in bytes without padding, and whether it is in main memory (HBM) and not in on-chip memory."""

    bytes: int
    main: bool = True


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `argument` is the text between its parentheses, `attributes` the text after them."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # leaves of the result
    argument: str
    attributes: str
    root: bool

    @cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(_NAME.findall(self.argument))

    def called(self, *roles: str) -> tuple[str, ...]:
        """Returns the names of called computations in attributes `roles`, as in calls=%x or branch_computations={%a, %b}."""
        names: list[str] = []
        for role in roles:
            for braces, single in re.findall(rf"\b{role}=(?:\{{([^}}]*)\}}|%([\w.\-]+))", self.attributes):
                names += _NAME.findall(braces) if braces else [single]
        return tuple(names)


@dataclass
class Computation:
    """One computation: instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        found = [i for i in self.instructions.values() if i.root]
        return found[-1] if found else list(self.instructions.values())[-1]

    @cached_property
    def parameters(self) -> dict[int, str]:
        return {int(i.argument): i.name for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users.setdefault(name, []).append(instruction)
        return users

    def bytes_of(self, name: str) -> int:
        return sum(shape.bytes for shape in self.instructions[name].shapes)


@dataclass(frozen=True)
class InstructionRun:
    """An executed instruction: how often it runs in one step (`times`), and whether it is inside a fusion."""

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool


@dataclass
class Module:
    """A compiled program. `unknown_loops` lists loops whose trip count is not in the text; they are counted once."""

    computations: dict[str, Computation]
    entry: str
    partitions: int
    unknown_loops: list[str] = field(default_factory=list)

    def runs(self) -> Iterator[InstructionRun]:
        """Yields every executed instruction, also those in fusions, but not the scalar functions of reductions and sorts."""
        self.unknown_loops.clear()
        yield from self._runs(self.entry, 1, False)

    def _runs(self, name: str, times: int, fused: bool) -> Iterator[InstructionRun]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield InstructionRun(instruction, computation, times, fused)
            match instruction.opcode:
                case "while":
                    trips = self._trips(instruction)
                    for body in instruction.called("body"):
                        yield from self._runs(body, times * trips, fused)
                case "conditional":
                    roles = ("branch_computations", "true_computation", "false_computation")
                    for branch in instruction.called(*roles):
                        yield from self._runs(branch, times, fused)
                case "call" | "async-start":
                    for callee in instruction.called("to_apply", "calls"):
                        yield from self._runs(callee, times, fused)
                case "fusion":
                    for callee in instruction.called("calls"):
                        yield from self._runs(callee, times, True)

    def _trips(self, loop: Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        constants = {n for name in loop.called("condition") for n in self._integers(name)}
        if len(constants) == 1 and min(constants) > 0:  # counters of scans start at 0 and increase by 1
            return constants.pop()
        self.unknown_loops.append(loop.name)
        return 1

    def _integers(self, name: str) -> Iterator[int]:
        for instruction in self.computations[name].instructions.values():
            if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.argument):
                yield int(instruction.argument)
            for callee in instruction.called("calls", "to_apply"):
                yield from self._integers(callee)


def parse(text: str) -> Module:
    """Parses the text of `compiled.as_text()`. Raises PlanError if it has no entry computation or cannot be parsed."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    for line in _whole_lines(text):
        if not line.startswith(" "):
            header = _HEADER.match(line)
            current = Computation(header[2]) if header and not line.startswith("HloModule") else None
            if current is not None:
                computations[current.name] = current
                entry = current.name if header[1] else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current.instructions[instruction.name] = instruction
    if not entry:
        raise PlanError(f"the compiled program has no entry computation; its text starts with {text[:200]!r}")
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _whole_lines(text: str) -> Iterator[str]:
    """Yields the lines, those of one instruction as one: attributes of kernels contain line breaks."""
    instruction = ""
    for line in text.splitlines():
        if instruction and line and not line.startswith((" ", "%", "ENTRY")) and line.strip() != "}":
            instruction += line
            continue
        if instruction:
            yield instruction
        instruction = line if line.startswith(" ") else ""
        if not instruction:
            yield line
    if instruction:
        yield instruction


def _instruction(line: str) -> Instruction:
    head, _, rest = line.strip().partition(" = ")
    root = head.startswith("ROOT ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(
        head.removeprefix("ROOT ").lstrip("%"),
        rest[:opening],
        parse_shapes(shape),
        rest[opening + 1 : closing],
        rest[closing + 1 :],
        root,
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise PlanError(f"cannot parse the compiled program: unbalanced parentheses in {text[opening : opening + 200]!r}")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Parses 'bf16[8,128]{1,0:T(8,128)S(1)}' or a tuple of these into one Shape per leaf; S(n) with n > 0 is on-chip memory.

    Raises PlanError for an unknown type.
    """
    return tuple(
        Shape(math.prod(int(d.strip("<= ")) for d in dims.split(",") if d) * _bits(kind) // 8, _main(layout))
        for kind, dims, layout in _SHAPE.findall(text)
    )


def _bits(kind: str) -> int:
    if kind not in _BITS:
        digits = re.match(r"[a-z]+(\d+)", kind)
        if not digits:
            raise PlanError(f"the compiled program contains the unknown type {kind!r}")
        _BITS[kind] = int(digits[1])
    return _BITS[kind]


def _main(layout: str) -> bool:
    space = re.search(r"S\((\d+)\)", layout)
    return not space or space[1] == "0"
