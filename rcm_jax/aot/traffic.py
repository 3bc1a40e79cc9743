"""What a compiled program moves without computing with it: copies, slices of stacked arrays, casts."""

import dataclasses

from rcm_jax.aot.hlo import Computation, Instruction, Module

MOVES = {
    "copy", "copy-start", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad",
    "reverse", "gather", "scatter", "reshape",
}  # fmt: skip
BESIDE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "broadcast", "convert"}  # in such fusions
SMALL = 1 << 10  # elements: the arithmetic of indices


@dataclasses.dataclass(frozen=True)
class Move:
    """bytes: written, all times together. shape: of one time."""

    bytes: int
    times: int
    shape: str
    where: str


def moves(module: Module) -> list[Move]:
    """Everything that the program writes as it read it, largest first. Of an update in place what is new counts."""
    found = []
    for where, i, times in module.scheduled():
        if size := _moved(module, where, i):
            found.append(Move(size * times, times, i.shape, i.op_name or i.name))
    return sorted(found, key=lambda move: -move.bytes)


def moved_bytes(module: Module) -> int:
    return sum(move.bytes for move in moves(module))


def launches(module: Module) -> int:
    """Kernels that the program starts."""
    kinds = ("fusion", "custom-call", "dot", "convolution", *MOVES)
    return sum(times for _, i, times in module.scheduled() if i.opcode in kinds and "annotate" not in i.attributes)


def _moved(module: Module, where: Computation, i: Instruction) -> int:
    if i.opcode == "fusion":
        (called,) = (module.computations[name] for name in i.called[:1])
        kinds = {j.opcode for j in called.instructions if _counts(j)}
        if not kinds & MOVES or kinds - MOVES - BESIDE:
            return 0
        return _size(called, called.root)
    return _size(where, i) if i.opcode in MOVES - {"reshape"} else 0


def _counts(i: Instruction) -> bool:
    """Whether it works on more than indices."""
    return i.bytes > SMALL


def _size(where: Computation, i: Instruction) -> int:
    """Bytes that the result of a moving instruction takes; of an update in place, of what is new."""
    if i.opcode == "dynamic-update-slice":
        return where.by_name[i.operands[1]].bytes
    if i.opcode == "tuple":
        return sum(_size(where, where.by_name[name]) for name in i.operands)
    if i.opcode in ("bitcast", "convert") and len(i.operands) == 1:
        inner = where.by_name[i.operands[0]]
        if inner.opcode == "dynamic-update-slice":
            return _size(where, inner)
    return i.bytes
