"""What the assembler makes of a kernel: registers, spills, tensor-core products, issue slots; and a model of its speed.

    for name, ptx in program.ptx.items(): print(assemble(ptx, name).main_loop)

`assemble` runs ptxas and nvdisasm (pip install 'rcm_jax[aot]') and finds the loops: a branch back, and what lies between.
The model and its assumptions are written out in docs/kernels.md; nothing here is measured.
"""

import dataclasses
import functools
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

HOW = "pip install 'rcm_jax[aot]'"

ISSUE = 1  # cycles that an instruction of a warp takes of its scheduler, of which an SM has 4
PIPES = {"MUFU": 8, "SHFL": 4, "LDS": 4, "STS": 4, "LDSM": 4, "STSM": 4, "LDL": 4, "STL": 4}  # where it is more
TENSOR_FLOPS = {80: 2048, 89: 1024, 90: 4096}  # an SM and cycle, dense, with operands of 2 bytes
HALF_RATE = ("TF32", "F32")  # operands of 4 bytes take twice as long
SHARED_BYTES = 128  # that an SM reads a cycle
MMA_ON_90 = (
    0.63  # share of a Hopper tensor core's rate that warps' own products (HMMA) reach, by published microbenchmarks
)

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
    """The instructions of a loop's body, as one warp runs them, inner loops once."""

    body: tuple[Instruction, ...]
    warps: int
    architecture: int

    @property
    def spilled(self) -> int:
        """Bytes that a thread moves to and from its stack in a turn."""
        return sum(_bytes(i) for i in self.body if i.kind in ("LDL", "STL"))

    @property
    def products(self) -> dict[str, int]:
        """How many tensor-core instructions of each shape all warps execute in a turn; HGMMA once for four warps."""
        counts: dict[str, int] = {}
        for i in self.body:
            if i.kind in ("HGMMA", "HMMA"):
                times = self.warps // 4 if i.kind == "HGMMA" else self.warps
                counts[i.name] = counts.get(i.name, 0) + times
        return counts

    @property
    def flops(self) -> int:
        """Of those products."""
        return sum(
            n * 2 * rows * columns * depth
            for name, n in self.products.items()
            for rows, columns, depth in [_shape(name)]
        )

    @property
    def tensor_cycles(self) -> float:
        """That a turn of all the block's warps keeps the tensor cores of an SM busy."""
        return sum(
            _tensor_cycles(i, self.architecture) * (self.warps // 4 if i.kind == "HGMMA" else self.warps)
            for i in self.body
        )

    @property
    def vector_cycles(self) -> float:
        """That the busiest unit beside them (an SM's four schedulers, or one of `PIPES`) needs for a turn of the block."""
        counts = {}
        for i in self.body:
            counts[i.kind] = counts.get(i.kind, 0) + 1
        busiest = max(n * PIPES.get(kind, ISSUE) for kind, n in counts.items()) if counts else 0
        return max(len(self.body) * ISSUE, busiest) * self.warps / 4


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
            raise ValueError("the kernel has no loop with a product of the tensor cores")
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
        loops=tuple(_loops(sass, threads // 32, int(target[1]))),
    )


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


def _loops(sass: str, warps: int, architecture: int) -> list[Loop]:
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
    """Rows, columns and depth of a product: HGMMA.64x128x16…, or HMMA.16816… and HMMA.1688…, which are m16n8k16, m16n8k8."""
    if found := re.search(r"\.(\d+)x(\d+)x(\d+)", name):
        return int(found[1]), int(found[2]), int(found[3])
    rows, columns, depth = re.search(r"\.(16)(8)(\d+)", name).groups()
    return int(rows), int(columns), int(depth)


def _tensor_cycles(instruction: Instruction, architecture: int) -> float:
    """Of all four tensor cores of an SM; where both operands are in shared memory, reading them may take longer."""
    if instruction.kind not in ("HGMMA", "HMMA"):
        return 0
    rows, columns, depth = _shape(instruction.name)
    wide = any(part == "TF32" for part in instruction.name.split("."))
    cycles = 2 * rows * columns * depth / TENSOR_FLOPS[architecture] * (2 if wide else 1)
    if instruction.kind == "HMMA":
        return cycles / (MMA_ON_90 if architecture == 90 else 1)
    in_shared = columns + (rows if re.match(r"\s*R\d+,\s*gdesc", instruction.operands) else 0)
    return max(cycles, in_shared * depth * (4 if wide else 2) / SHARED_BYTES)
