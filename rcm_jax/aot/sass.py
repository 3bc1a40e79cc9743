"""What the assembler makes of a kernel: registers, spills, tensor-core products, issue slots; and a model of its speed.

    loop = assemble(program.ptx["attention_forward"], "attention_forward").main_loop
    low, high = loop.share(useful_flops)

`assemble` runs ptxas and nvdisasm (pip install 'rcm_jax[aot]') and finds the loops: a branch back, what lies between.
The model and its assumptions are written out in docs/kernels.md; nothing here is measured.
"""

import dataclasses
import functools
import math
import os
import re
import subprocess
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

from rcm_jax.aot.compile import HOW
from rcm_jax.aot.gpus import Gpu

# Cycles that a warp's instruction keeps a quarter of an SM busy, where that is more than its issue slot.
PIPES = {"MUFU": 8, "SHFL": 4, "LDS": 4, "STS": 4, "LDSM": 4, "STSM": 4, "LDL": 4, "STL": 4}
TENSOR_FLOPS = {80: 2048, 89: 512, 90: 4096}  # of an SM a cycle, dense, with operands of 2 bytes; of 4 bytes half
SHARED_BYTES = 128  # that an SM reads of its shared memory a cycle
HMMA_ON_90 = 0.63  # of Hopper's tensor cores, what products of single warps reach by published microbenchmarks
PRODUCTS = {"HGMMA": 4, "HMMA": 1}  # warps that execute one together

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
LABEL = re.compile(r"^(\.L_x_\d+):")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str  # with its suffixes: HGMMA.64x128x16.F32.BF16
    operands: str
    never: bool  # it is predicated off for good

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions of a loop's body as one warp runs them, of a block with so many warps."""

    body: tuple[Instruction, ...]
    warps: int
    architecture: int

    @property
    def spilled(self) -> int:
        """Bytes that a thread moves to and from its stack in a turn."""
        return sum(_bytes(i) for i in self.body if i.kind in ("LDL", "STL"))

    @property
    def loaded(self) -> int:
        """Bytes that the block asks of memory in a turn."""
        return sum(_bytes(i) for i in self.body if i.kind in ("LDG", "LDGSTS")) * 32 * self.warps

    @property
    def products(self) -> Counter[str]:
        """How many products of each shape the tensor cores execute in a turn, for all warps."""
        counts = Counter()
        for i in self.body:
            if i.kind in PRODUCTS:
                counts[i.name] += self.warps // PRODUCTS[i.kind]
        return counts

    @property
    def flops(self) -> int:
        """Of those products."""
        return sum(n * 2 * math.prod(_shape(name)) for name, n in self.products.items())

    @property
    def tensor_cycles(self) -> float:
        """That a turn of the block keeps the four tensor cores of an SM busy."""
        products = (i for i in self.body if i.kind in PRODUCTS)
        return sum(_tensor_cycles(i, self.architecture) * (self.warps // PRODUCTS[i.kind]) for i in products)

    @property
    def vector_cycles(self) -> float:
        """That a turn of the block keeps the busiest other unit busy: the four schedulers, or one of `PIPES`."""
        counts = Counter(i.kind for i in self.body)
        pipes = (n * PIPES[kind] for kind, n in counts.items() if kind in PIPES)
        return max(len(self.body), *pipes, 0) * self.warps / 4

    def share(self, useful: float) -> tuple[float, float]:
        """Of the peak for so many useful FLOPs a turn: where nothing overlaps, and where all of it does."""
        wide = any(_is_wide(name) for name in self.products)
        least = useful / TENSOR_FLOPS[self.architecture] * (2 if wide else 1)
        return least / (self.tensor_cycles + self.vector_cycles), least / max(self.tensor_cycles, self.vector_cycles)


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A kernel as machine code."""

    registers: int  # a thread
    spilled: int  # bytes a thread stores to its stack, wherever
    threads: int
    serialised: bool  # ptxas could not let warp-group products run on while others are issued
    loops: tuple[Loop, ...]  # innermost ones with products, shortest first

    @property
    def main_loop(self) -> Loop:
        """The one without masks, if there are two. Raises ValueError if no loop has a product."""
        if not self.loops:
            raise ValueError("the kernel has no loop with a product of the tensor cores that is known: HMMA, HGMMA")
        return self.loops[0]


def assemble(ptx: str, name: str) -> Assembled:
    """Assembles the kernel of that name. Raises RuntimeError if a tool is missing or refuses."""
    target = re.search(r"^\.target sm_(\d+)(\w*)", ptx, re.MULTILINE)
    entry = ptx[re.search(rf"\.visible \.entry {name}\(", ptx).start() :]
    threads = int(re.search(r"\.(?:req|max)ntid (\d+)", entry)[1])
    with tempfile.TemporaryDirectory(prefix="rcm_jax_sass_") as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        arch = f"-arch=sm_{target[1]}{target[2]}"
        log = _run(find_tool("ptxas"), "-v", arch, "-e", name, source, "-o", binary)
        sass = _run(find_tool("nvdisasm"), "-c", binary)
    properties = log[log.index(f"Compiling entry function '{name}'") :]
    return Assembled(
        registers=int(re.search(r"Used (\d+) registers", properties)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", properties)[1]),
        threads=threads,
        serialised="are serialized" in log,
        loops=tuple(find_loops(sass, threads // 32, int(target[1]))),
    )


def blocks_on_core(gpu: Gpu, kernel: Assembled, shared: int) -> int:
    """How many blocks of the kernel, with so many bytes of shared memory each, one multiprocessor holds at a time."""
    registers, memory, threads = (
        int(re.search(rf"{field}: (\d+)", gpu.target)[1])
        for field in ("registers_per_core_limit", "shared_memory_per_core", "threads_per_core_limit")
    )
    a_thread = -(-kernel.registers // 8) * 8  # handed out by eight
    by_memory = memory // (shared + 1024)  # the driver keeps 1 KiB of each
    return min(registers // (a_thread * kernel.threads), by_memory, threads // kernel.threads)


@functools.cache
def find_tool(name: str) -> Path:
    """A program of NVIDIA's wheels. Raises RuntimeError with what to install."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    for path in sorted(packages.glob(f"*/bin/{name}")):
        if os.access(path, os.X_OK):
            return path
    raise RuntimeError(f"reading machine code needs {name}, which is not under {packages}: {HOW}")


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[:2000]}")
    return done.stdout + done.stderr


def find_loops(sass: str, warps: int, architecture: int) -> list[Loop]:
    """The innermost loops with products, shortest first."""
    code, labels = [], {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.search(line):
            code.append(Instruction(found[3], found[4], (found[2] or "").startswith("@!PT")))
    spans = set()
    for end, branch in enumerate(code):
        target = re.search(r"\.L_x_\d+", branch.operands) if branch.kind in ("BRA", "BRX", "JMP") else None
        if target and labels.get(target[0], end + 1) <= end:
            spans.add((labels[target[0]], end + 1))
    with_products = [s for s in spans if any(i.kind in ("HGMMA", "HMMA") for i in code[slice(*s)])]
    innermost = [s for s in with_products if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in with_products)]
    bodies = sorted((tuple(i for i in code[slice(*s)] if not i.never) for s in innermost), key=len)
    return [Loop(body, warps, architecture) for body in bodies]


def _bytes(instruction: Instruction) -> int:
    width = re.search(r"\.(64|128)\b", instruction.name)
    return int(width[1]) // 8 if width else 4


def _shape(name: str) -> tuple[int, int, int]:
    """Rows, columns and depth. HGMMA.64x128x16… says them; HMMA.16816…, HMMA.1688… are 16x8x16, 16x8x8."""
    if found := re.search(r"\.(\d+)x(\d+)x(\d+)", name):
        return int(found[1]), int(found[2]), int(found[3])
    return 16, 8, int(re.search(r"\.168(\d+)", name)[1])


def _is_wide(name: str) -> bool:
    return "TF32" in name


def _tensor_cycles(product: Instruction, architecture: int) -> float:
    """Of an SM's four tensor cores. Reading operands from shared memory, B always, may take longer than multiplying."""
    rows, columns, depth = _shape(product.name)
    wide = _is_wide(product.name)
    cycles = 2 * rows * columns * depth / TENSOR_FLOPS[architecture] * (2 if wide else 1)
    if product.kind == "HMMA":
        return cycles / (HMMA_ON_90 if architecture == 90 else 1)
    a_is_shared = re.match(r"\s*R\d+,\s*gdesc", product.operands) is not None
    read = (columns + a_is_shared * rows) * depth * (4 if wide else 2)
    return max(cycles, read / SHARED_BYTES)
