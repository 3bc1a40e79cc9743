"""How fast a file is converted, and in how much memory, beside safetensors' own copy of it and the system's.

    python -m tests.benchmarks.convert_speed
    python -m tests.benchmarks.convert_speed --gib 28 --folder /scratch --json speed.json

The file is of the published layout, in bfloat16, every byte random, and is not in the page cache when a way begins.
Each way is a process of its own, which ends when what it wrote is on the disk. They take turns --rounds times; what is
printed is the median. safetensors' own functions hold a file whole, so its copy is made tensor by tensor, each into a
file of its own. All files go to --folder, at most twice the size at a time, and are removed.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from rcm_jax.convert.networks import MODELS
from rcm_jax.convert.table import lazy_to_theirs
from rcm_jax.convert.tensors import BLOCK_BYTES, Tensor, total_bytes
from rcm_jax.tensor_stream import write_safetensors
from rcm_jax.wan.config import WAN_1_3B, WAN_14B, DiTConfig

NETWORK = MODELS["t2v-14B"][0]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# of each way its imports, then what is timed; `source` and `out` are paths
WAYS = {
    "rcm-convert": ("from rcm_jax.convert import commands", "commands.main([source, out + '.safetensors'])"),
    "rcm-convert --dtype float32": (
        "from rcm_jax.convert import commands", "commands.main([source, out + '.safetensors', '--dtype', 'float32'])",
    ),
    "rcm-convert export": (
        "from rcm_jax.convert import commands", "commands.main(['export', source, out + '.safetensors'])",
    ),
    "rcm-convert verify": ("from rcm_jax.convert import commands", "commands.main(['verify', source])"),
    "safetensors, tensor by tensor": (
        "import ml_dtypes; from safetensors import safe_open; from safetensors.numpy import save_file",
        """
os.mkdir(out)
for name in safe_open(source, "numpy").keys():
    with safe_open(source, "numpy") as file:
        save_file({name: file.get_tensor(name)}, f"{out}/{name}")
""",
    ),
    "copy": ("import shutil", "shutil.copyfile(source, out)"),
}  # fmt: skip
CHILD = """
import os, sys, time
from pathlib import Path
source, out = sys.argv[1:]
{imports}

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

before = kilobytes("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
start, busy = time.perf_counter(), time.process_time()
{run}
written = time.perf_counter() - start
os.sync()
print("took", written, time.perf_counter() - start, time.process_time() - busy, 1024 * (kilobytes("VmHWM:") - before))
"""


def of_size(size: float) -> DiTConfig:
    """Layers of the 14B network, of the 1.3B where the file is small."""
    base = WAN_14B if size > 4e9 else WAN_1_3B
    sizes = [total_bytes(published(dataclasses.replace(base, num_layers=n))) for n in (1, 2)]
    return dataclasses.replace(base, num_layers=max(1, round(1 + (size - sizes[0]) / (sizes[1] - sizes[0]))))


def published(config: DiTConfig) -> dict[str, Tensor]:
    """By Wan2.1's names, random bytes."""
    rng = np.random.default_rng(0)
    flat = {name: Tensor(shape, BFLOAT16, None) for name, shape in NETWORK.shapes(config).items()}
    wan = lazy_to_theirs(NETWORK.table.rows(config), flat, config.num_layers, NETWORK.table.layouts(config))

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(rng.bytes(2 * int(np.prod(shape))), BFLOAT16).reshape(shape)

    return {name: Tensor(t.shape, BFLOAT16, lambda t=t: draw(t.shape)) for name, t in wan.items()}


def forget(path: Path) -> None:
    """The page cache lets go of a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(way: str, source: Path, folder: Path) -> tuple[float, float, float, int]:
    """Seconds until it is written, until it is on the disk, of the processors; bytes of memory beyond the imports."""
    forget(source)
    (place := folder / "way").mkdir()
    imports, run = WAYS[way]
    code = CHILD.format(imports=imports, run=run)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    argv = [sys.executable, "-c", code, str(source), str(place / "out")]
    told = subprocess.run(argv, capture_output=True, text=True, check=True, env=env).stdout.split("took")[1].split()
    shutil.rmtree(place)
    return float(told[0]), float(told[1]), float(told[2]), int(told[3])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gib", type=float, default=1.0, help="of the file (default %(default)s)")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    p.add_argument("--folder", help="where the files go")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    found: dict[str, list] = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, tensors = Path(folder, "wan.safetensors"), published(of_size(args.gib * 2**30))
        size = total_bytes(tensors)
        need, free = 3.1 * size if "rcm-convert --dtype float32" in args.ways else 2.1 * size, shutil.disk_usage(folder)
        if free.free < need:
            raise SystemExit(f"error: {folder} has {free.free / 1e9:.1f} GB left, and this takes {need / 1e9:.1f} GB")
        write_safetensors(source, tensors, {}, lambda _: None)
        for _ in range(args.rounds):
            for way in args.ways:
                found[way].append(measure(way, source, Path(folder)))
    print(f"{size / 1e9:.2f} GB, blocks of {BLOCK_BYTES / 1e6:.0f} MB, {os.cpu_count()} processors")
    print(f"{'':31}MB/s  on the disk  processor s  memory GB")
    for way, runs in found.items():
        written, synced, busy, memory = np.median(np.array(runs), axis=0)
        print(f"{way:30} {size / written / 1e6:5.0f} {size / synced / 1e6:12.0f} {busy:12.1f} {memory / 1e9:10.2f}")
    if args.json:
        args.json.write_text(json.dumps({"bytes": size, "ways": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
