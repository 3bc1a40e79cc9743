"""FLOPs and bytes of instructions, counted from shapes, and the least time that they can take on a GPU.

A matrix product is 2·m·n·k FLOPs, wherever it stands: alone, in a fusion, in a loop (times its trips). Attention's
kernels say their matrix products by their names (`ATTENTION`), their sizes by their operands. All else is bytes.
"""

import dataclasses
import math
import re
from collections import Counter

from rcm_jax.aot.gpus import Gpu
from rcm_jax.aot.hlo import Computation, Instruction, Module

ATTENTION = {"forward": 2, "tangent": 5, "fused": 6, "dq": 3, "dkv": 4}  # matrix products of a kernel
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while", "call", "conditional", "after-all")


def flops(module: Module) -> float:
    """Of the whole program on one device."""
    return sum(times * instruction_flops(module, where, i) for where, i, times in module.scheduled())


def kernels(module: Module) -> Counter:
    """How often each of our attention kernels runs in the program."""
    count: Counter = Counter()
    for _, i, times in module.scheduled():
        if name := attention_kernel(i):
            count[name] += times
    return count


def attention_kernel(i: Instruction) -> str:
    """ "forward", "tangent", …: which of our kernels the instruction is, or ""."""
    if i.opcode != "custom-call" or "triton" not in i.attributes:
        return ""
    found = re.findall(r"attention_(\w+?)(?=/|$)", i.op_name)
    return found[-1] if found and found[-1] in ATTENTION else ""


def instruction_flops(module: Module, where: Computation, i: Instruction) -> float:
    """Of an instruction that a device issues: what is in its fusion counts, what is in its loop does not."""
    if i.opcode == "dot":
        return _dot(where, i)
    if i.opcode == "convolution" or "__cudnn$conv" in i.attributes:
        return _convolution(where, i)
    if i.opcode == "fusion":
        inside = [module.computations[name] for name in i.called]
        return sum(instruction_flops(module, c, j) for c in inside for j in c.instructions)
    if kernel := attention_kernel(i):
        return _attention(where, i, kernel)
    return 0.0


def _shape(where: Computation, name: str) -> tuple[int, ...]:
    return where.by_name[name].arrays[0][1]


def _dot(where: Computation, i: Instruction) -> float:
    lhs = _shape(where, i.operands[0])
    contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", i.attributes)[1]
    return 2.0 * math.prod(i.arrays[0][1]) * math.prod(lhs[int(d)] for d in contracted.split(",") if d)


def _convolution(where: Computation, i: Instruction) -> float:
    kernel = _shape(where, i.operands[1])
    labels = re.search(r"dim_labels=\w+_(\w+)->", i.attributes)[1]
    return 2.0 * math.prod(i.arrays[0][1]) * math.prod(kernel) / kernel[labels.index("o")]


def _attention(where: Computation, i: Instruction, kernel: str) -> float:
    """By the convention 2·B·N·D a (query, key) pair and product. Pairs are all of them, or what the name says."""
    (B, S, N, D), (_, K, _, _) = (_shape(where, name) for name in i.operands[:2])
    said = re.search(r"pairs_(\d+)/", i.op_name)
    return 2.0 * B * N * D * ATTENTION[kernel] * (int(said[1]) if said else S * K)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a GPU can do at most: FLOP/s of bfloat16 products, and bytes/s: of its memory, and in one direction of its
    links to GPUs of its host and of other hosts."""

    products: float
    memory: float
    links: float
    network: float


RATES = {
    "h100": Rates(989e12, 3.35e12, 450e9, 50e9),
    "h200": Rates(989e12, 4.8e12, 450e9, 50e9),
    "a100": Rates(312e12, 2.04e12, 300e9, 25e9),
    "b200": Rates(2250e12, 8.0e12, 900e9, 50e9),
    "rtx_4090": Rates(165e12, 1.01e12, 32e9, 12e9),
}


def seconds(module: Module, where: Computation, i: Instruction, gpu: Gpu) -> float:
    """The least time of one run of the instruction: its products and its bytes at the GPU's full rates. A loop's is
    that of its body times its trips."""
    if i.opcode == "while":
        body = module.computations[re.search(r"body=%([\w.\-]+)", i.attributes)[1]]
        return (i.trips or 1) * sum(seconds(module, body, j, gpu) for j in body.instructions)
    if i.opcode in FREE or i.opcode.endswith(("-start", "-done")):
        return 0.0
    rates = RATES[gpu.name]
    moved = i.bytes + sum(where.by_name[name].bytes for name in i.operands if name in where.by_name)
    return max(instruction_flops(module, where, i) / rates.products, moved / rates.memory)
