"""Which arrays a program holds where it holds the most."""

import dataclasses
import re

from rcm_jax.aot.hlo import Module

LINE = re.compile(r"^\s+([\w.\-]+)(\{[\d,]*\}): (\d+) bytes \(cumulative")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """`name` says where the program made it: the path of an argument, or the operation's."""

    name: str
    shape: str
    bytes: int


def live_at_peak(module: Module, live_ranges: str) -> list[Buffer]:
    """All of them, the largest first."""
    peak = re.search(r"Live ranges at \d+ \(peak\):\n((?:\s+[\w.\-]+\{[\d,]*\}: .*\n)*)", live_ranges)
    if peak is None:
        return []
    made = {i.name: i for c in module.computations.values() for i in c.instructions}
    buffers = []
    for name, index, size in (LINE.match(line).groups() for line in peak[1].splitlines()):
        i = made.get(name)
        place = [int(n) for n in index.strip("{}").split(",") if n]
        arrays = i.arrays if i else ()
        dtype, dims = (
            arrays[place[0]] if place and len(place) == 1 and place[0] < len(arrays) else (arrays or [("", ())])[0]
        )
        shape = f"{dtype}[{','.join(map(str, dims))}]" if dtype else ""
        buffers.append(Buffer((i.op_name if i else "") or name, shape, int(size)))
    return sorted(buffers, key=lambda b: -b.bytes)
