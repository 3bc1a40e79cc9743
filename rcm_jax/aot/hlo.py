"""Reads the text of a scheduled HLO module: computations, their instructions in order, and how often each runs."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
NAME = re.compile(r"%([\w.\-]+)")
START = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
SIZES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`shape` is the result's text; `operands` are names in the same computation; `attributes` what stands behind."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def op_name(self) -> str:
        """Where the program made it: jit(step)/jvp(DiT)/while/body/…"""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return re.sub(r"\\(.)", r"\1", found[1]) if found else ""

    @functools.cached_property
    def arrays(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(dtype, shape) of every array of the result."""
        return tuple((t, tuple(int(d) for d in dims.split(",") if d)) for t, dims in ARRAY.findall(self.shape))

    @property
    def bytes(self) -> int:
        return sum(math.prod(dims) * itemsize(dtype) for dtype, dims in self.arrays)

    @property
    def trips(self) -> int | None:
        """How often a while loop runs, where the compiler knows."""
        found = TRIPS.search(self.attributes)
        return int(found[1]) if found else None

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs; of a conditional, its branches."""
        branches = BRANCHES.search(self.attributes)
        return tuple(CALLED.findall(self.attributes)) + tuple(NAME.findall(branches[1]) if branches else ())


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return self.instructions[-1]


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str

    def scheduled(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that a device issues, with its computation and how often it runs: those of the entry and of
        the bodies of loops, calls and conditionals, but not those inside a fusion. A loop whose trips the compiler does
        not know counts once, and so does each branch of a conditional."""
        yield from self._from(self.entry, 1)

    def _from(self, name: str, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
        computation = self.computations[name]
        for i in computation.instructions:
            yield computation, i, times
            if i.opcode == "while":
                yield from self._from(re.search(r"body=%([\w.\-]+)", i.attributes)[1], times * (i.trips or 1))
            elif i.opcode in ("call", "conditional") or (i.opcode == "async-start" and i.called):
                for called in i.called:
                    yield from self._from(called, times)

    def unknown_trips(self) -> list[str]:
        """Names of the loops that count once since nobody knows how often they run."""
        return [i.op_name or i.name for _, i, _ in self.scheduled() if i.opcode == "while" and i.trips is None]


def read(text: str) -> Module:
    """The module of this text. Raises ValueError where it has no entry."""
    computations, entry, current, name = {}, None, [], ""
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            name, current = found[2], []
            entry = name if found[1] else entry
        elif line == "}" and name:
            computations[name] = Computation(name, tuple(current))
            name = ""
        elif name and (found := START.match(line)):
            current.append(_instruction(found[2], line[found.end() :]))
    if entry is None:
        raise ValueError("this text of a program has no ENTRY computation")
    return Module(computations, entry)


def itemsize(dtype: str) -> int:
    """Bytes of an element of an HLO type."""
    if dtype in SIZES:
        return SIZES[dtype]
    if dtype.startswith("f8"):
        return 1
    bits = re.fullmatch(r"[a-z]+(\d+)", dtype)
    return math.ceil(int(bits[1]) / 8) if bits else 0


def _instruction(name: str, rest: str) -> Instruction:
    """From what stands behind "%name = ": a shape, an opcode, operands in parentheses, attributes."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[: end + 1].strip(), rest[end + 1 :].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    operands = tuple(NAME.findall(rest[opened : closed + 1]))
    return Instruction(name, shape, rest[:opened], operands, rest[closed + 1 :])


def _closing(text: str, opened: int) -> int:
    """Where the parenthesis that opens at `opened` closes."""
    depth = 0
    for at in range(opened, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unclosed parenthesis in {text[:80]!r}")
