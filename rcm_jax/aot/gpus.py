"""GPUs that programs are compiled for: what the compiler is told of each (`targets/*.txtpb`).

The H100 and the H200 are as the devices report themselves; A100, B200 and RTX 4090 are put together from their makers'
published numbers.
"""

import dataclasses
import functools
import re
from pathlib import Path

TARGETS = Path(__file__).parent / "targets"
SPARE = 0.08  # of a GPU's memory, for what is not XLA's: CUDA's context, NCCL, fragments


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU. `target` is XLA's description of it; `device_kind` the name that its devices carry in JAX."""

    name: str
    device_kind: str
    capability: float
    memory: int  # bytes
    cores: int  # streaming multiprocessors
    target: str


@functools.cache
def gpus() -> dict[str, Gpu]:
    """All that are known, by name."""
    return {path.stem: _read(path) for path in sorted(TARGETS.glob("*.txtpb"))}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name; upper case and dashes do not matter. Raises ValueError that lists the names."""
    key = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if key not in gpus():
        raise ValueError(f"gpu {name!r} is not known; use one of {', '.join(gpus())}")
    return gpus()[key]


def capability_of(device_kind: str) -> float | None:
    """The compute capability of devices that call themselves so, or None."""
    return next((gpu.capability for gpu in gpus().values() if gpu.device_kind == device_kind), None)


def usable(memory: int) -> int:
    """Bytes of a GPU's memory that a program may take."""
    return round((1 - SPARE) * memory)


def _read(path: Path) -> Gpu:
    target = path.read_text()

    def field(pattern: str) -> str:
        return re.search(pattern, target)[1]

    return Gpu(
        name=path.stem,
        device_kind=field(r'device_description_str: "(.*)"'),
        capability=float(".".join(re.search(r"major: (\d+) minor: (\d+)", target).groups())),
        memory=int(field(r"device_memory_size: (\d+)")),
        cores=int(field(r"core_count: (\d+)")),
        target=target,
    )
