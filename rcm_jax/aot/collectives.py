"""What a program sends between devices: how much, along which axes of the mesh, and what computes meanwhile."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from rcm_jax.aot.compile import GPUS_A_HOST
from rcm_jax.aot.costs import RATES, seconds
from rcm_jax.aot.gpus import Gpu
from rcm_jax.aot.hlo import Computation, Instruction, Module, itemsize

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective along some axes of the mesh, over the whole program.

    bytes: what a device holds of the larger side (the gathered array, the one that is reduced), times how often.
    seconds: that at the full rate of the slowest link on the way. covered: the part of these seconds during which the
        device computes: between a collective's start and its end lie instructions that take at least so long.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    seconds: float
    covered: float


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One instruction: `dims` are the shape of its largest array."""

    kind: str
    axes: tuple[str, ...]
    times: int
    bytes: int
    seconds: float
    covered_seconds: float
    dims: tuple[int, ...]
    op_name: str


def collectives(module: Module, mesh_shape: dict[str, int], gpu: Gpu) -> list[Collective]:
    """All, by kind and axes, the most bytes first."""
    groups: dict[tuple, list[Transfer]] = defaultdict(list)
    for transfer in transfers(module, mesh_shape, gpu):
        groups[transfer.kind, transfer.axes].append(transfer)
    out = []
    for (kind, axes), members in groups.items():
        total = sum(t.times * t.seconds for t in members)
        covered = sum(t.times * t.covered_seconds for t in members)
        count, size = sum(t.times for t in members), sum(t.times * t.bytes for t in members)
        out.append(Collective(kind, axes, count, size, total, covered / total if total else 1.0))
    return sorted(out, key=lambda c: -c.bytes)


def transfers(module: Module, mesh_shape: dict[str, int], gpu: Gpu) -> list[Transfer]:
    """Every instruction that sends, in the order of the program."""
    out = []
    for where, i, times in module.scheduled():
        kind = next((k for k in KINDS if i.opcode in (k, f"{k}-start")), None)
        if kind is None:
            continue
        groups = replica_groups(i.attributes, int(np.prod(list(mesh_shape.values()))))
        _, dims = max(i.arrays, key=lambda a: itemsize(a[0]) * np.prod(a[1]))
        size = _larger_side(i, kind)
        took = _seconds(kind, size, groups, gpu)
        meanwhile = _meanwhile(module, where, i, gpu)
        out.append(
            Transfer(kind, axes_of(groups, mesh_shape), times, size, took, min(took, meanwhile), dims, i.op_name)
        )
    return out


def _larger_side(i: Instruction, kind: str) -> int:
    """Bytes of the gathered array, or of what is reduced or exchanged: the result of a start holds both sides."""
    sizes = [itemsize(dtype) * int(np.prod(dims)) for dtype, dims in i.arrays]
    if not i.opcode.endswith("-start") or kind == "all-reduce":  # the result alone
        return sum(sizes)
    half = len(sizes) // 2
    return max(sum(sizes[:half]), sum(sizes[half : 2 * half]))


def _seconds(kind: str, size: int, groups: np.ndarray, gpu: Gpu) -> float:
    """A ring's: every device sends (n - 1)/n of the larger side, twice for an all-reduce."""
    n = groups.shape[1]
    across = bool((groups // GPUS_A_HOST != groups[:, :1] // GPUS_A_HOST).any())
    rate = RATES[gpu.name].network if across else RATES[gpu.name].links
    return (2 if kind == "all-reduce" else 1) * size * (n - 1) / n / rate


def _meanwhile(module: Module, where: Computation, start: Instruction, gpu: Gpu) -> float:
    """The least time of what stands between a start and its done in the schedule; 0 for what is not asynchronous."""
    if not start.opcode.endswith("-start") or '"is_sync":true' in start.attributes:
        return 0.0
    total, inside = 0.0, False
    for i in where.instructions:
        if i is start:
            inside = True
        elif inside and i.opcode.endswith("-done") and start.name in i.operands:
            return total
        elif inside:
            total += seconds(module, where, i, gpu)
    return total


def replica_groups(attributes: str, count: int) -> np.ndarray:
    """Devices of each group, [groups, size], from any of the forms that HLO writes."""
    order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({order}\))?\s*\{{([^}}]*)\}}", attributes
    ):
        return _named_groups(found[1], found[4], found[2], found[3])
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={order}", attributes):
        return _iota(found[2], found[3]).reshape(_numbers(found[1]))
    if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        pairs = re.findall(r"\{?(\d+),(\d+)", found[1])
        return np.array([[int(a), int(b)] for a, b in pairs])
    return np.arange(count)[None]


def _numbers(words: str | None) -> list[int]:
    return [int(n) for n in (words or "").split(",") if n]


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Device numbers in the order that [shape]T(order) means."""
    ids = np.arange(int(np.prod(_numbers(shape)))).reshape(_numbers(shape))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _named_groups(mesh: str, axes: str, devices: str | None, order: str | None) -> np.ndarray:
    """mesh['a'=2,'b'=4] {'b'}: groups along b, of devices in the order that is told, if one is. An axis may be a part
    of one: 'a':(1)2 is its first factor."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    split, wanted = [], []
    parts = {name: (int(before), int(size)) for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", axes)}
    whole = [name for name in re.findall(r"'([^']+)'", axes) if name not in parts]
    for name, size in sizes.items():
        before, part = parts.get(name, (1, size if name in whole else 1))
        split += [before, part, size // (before * part)]
        wanted += [False, name in whole or name in parts, False]
    ids = _iota(devices or ",".join(map(str, split)), order).reshape(split)
    order = [d for d, w in enumerate(wanted) if not w] + [d for d, w in enumerate(wanted) if w]
    group = int(np.prod([n for n, w in zip(split, wanted, strict=True) if w]))
    return ids.transpose(order).reshape(-1, group)


def axes_of(groups: np.ndarray, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())), -1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, d in zip(mesh_shape, differ, strict=True) if d)


def gathered(transfers: Sequence[Transfer], batch: int, tokens: int, width: int) -> list[Transfer]:
    """Transfers that bring all tokens of a video, each of that width or more, to devices that have a part of them, or
    those of all the batch's videos to every device: no step should."""
    return [
        t for t in transfers
        if t.kind == "all-gather" and {tokens, batch * tokens} & set(t.dims) and np.prod(t.dims) >= tokens * width
    ]  # fmt: skip
