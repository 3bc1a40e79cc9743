"""The published sizes with random weights: convert, load, export, and one sampling run, with time and memory of each.

    python -m tests.benchmarks.full_size_drill [--parts dit vae umt5 sample] [--folder DIR] [--keep] [--json OUT]

Files are written first, one tensor at a time, in the published layouts, names and dtypes: Wan2.1-T2V-1.3B (float32),
Wan2.1_VAE.pth (float32), models_t5_umt5-xxl-enc-bf16.pth. Every step is a process of its own; memory is its largest
resident set, which counts the pages of mapped files too. The exported file must have the original's numbers, bit by
bit, or the drill ends with an error. The sampling run takes the converted files (made now for the parts that are not
asked for): prompt, umT5-XXL, the 1.3B network in 2 steps, autoencoder, MP4; its tokenizer is a tiny one.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from rcm_jax.convert.files import open_weights
from rcm_jax.convert.networks import MODELS
from rcm_jax.convert.table import lazy_to_theirs
from rcm_jax.convert.tensors import Tensor, total_bytes
from rcm_jax.convert.torch_io import write_torch
from rcm_jax.tensor_stream import write_safetensors
from tests.benchmarks import machine, write_json
from tests.wan.tiny import NAMES, write_tokenizer

PUBLISHED = {"dit": ("t2v-1.3B", np.float32), "vae": ("vae", np.float32), "umt5": ("umt5-xxl", ml_dtypes.bfloat16)}
LOAD = "import sys; from rcm_jax.model_file import load_model; load_model(sys.argv[1], dtype=None)"
POOL = 1 << 24  # random numbers that all tensors are cut from


def published_tensors(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights by the published names, made when they are read, small enough for activations to stay finite."""
    model, dtype = PUBLISHED[name]
    network, config = MODELS[model]
    rng = np.random.default_rng(seed)
    pool = (0.02 * rng.standard_normal(POOL, np.float32)).astype(dtype)

    def draw(shape: tuple[int, ...], around: float) -> Tensor:
        start = int(rng.integers(POOL))

        def load() -> np.ndarray:
            numbers = np.resize(np.roll(pool, start), shape)
            return numbers if not around else (numbers + dtype(around)).astype(dtype)

        return Tensor(shape, np.dtype(dtype), load)

    def parameter(path: str, shape: tuple[int, ...]) -> Tensor:
        around = 1.0 if path.endswith("scale") else 0.0
        if path.startswith("blocks/"):
            return Tensor.stack([draw(shape[1:], around) for _ in range(shape[0])])
        return draw(shape, around)

    flat = {path: parameter(path, shape) for path, shape in network.shapes(config).items()}
    table = network.table
    return lazy_to_theirs(table.rows(config), flat, network.num_layers(config), table.layouts(config))


def write_published(name: str, path: Path) -> None:
    tensors = published_tensors(name)
    size = total_bytes(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(path.parent).free) < 3.2 * size:
        raise SystemExit(
            f"error: {path.parent} has {free / 1e9:.0f} GB left; this part takes {3.2 * size / 1e9:.0f} GB"
        )
    with tqdm(desc=path.name, total=size, unit="B", unit_scale=True) as bar:
        if path.suffix == ".safetensors":
            write_safetensors(path, tensors, {}, bar.update)
        else:
            write_torch(path, tensors, bar.update)


def apart(call: str, *arguments: str | Path) -> None:
    """Calls a function of this module in a process of its own. Linux counts a parent's largest resident set as its
    children's too, so this process must stay small."""
    code = f"import sys; from pathlib import Path; from {__spec__.name} import *; {call}"
    if subprocess.run([sys.executable, "-c", code, *map(str, arguments)]).returncode:
        raise SystemExit(f"error: {call} failed")


def measured(step: str, *command: str | Path) -> dict:
    """Runs a process: its seconds and its largest resident set in GB. Ends the drill where it fails."""
    print(f"{step}: {' '.join(map(str, command))}", flush=True)
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, *map(str, command)], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"error: {step} ended with {os.waitstatus_to_exitcode(status)}")
    return {"step": step, "seconds": time.perf_counter() - start, "peak_gb": usage.ru_maxrss * 1024 / 1e9}


def check_same(a: Path, b: Path) -> None:
    """Ends with an error unless two files have the same tensors, bit by bit."""
    x, y = (open_weights(path).groups[""] for path in (a, b))

    def equal(name: str) -> bool:
        return all(
            np.array_equal(p.view(np.uint8), q.view(np.uint8))
            for p, q in zip(x[name].blocks(), y[name].blocks(), strict=True)
        )

    if x.keys() != y.keys() or not all(map(equal, x)):
        raise SystemExit(f"error: {a} and {b} differ")


def drill_part(name: str, folder: Path, keep: bool) -> list[dict]:
    """Writes the published file, converts, loads and exports it; leaves the converted file."""
    source, ours = folder / NAMES[name], converted(name, folder)
    back = source.with_stem(f"{source.stem}-back")
    apart("write_published(sys.argv[1], Path(sys.argv[2]))", name, source)
    rows = [
        measured(f"{name}: convert", "-m", "rcm_jax.convert", source, ours, "--overwrite"),
        measured(f"{name}: load", "-c", LOAD, ours),
        measured(f"{name}: export", "-m", "rcm_jax.convert", "export", ours, back, "--overwrite"),
    ]
    apart("check_same(Path(sys.argv[1]), Path(sys.argv[2]))", source, back)
    size = {"file_gb": source.stat().st_size / 1e9}
    if not keep:
        source.unlink()
        back.unlink()
    return [row | size for row in rows]


def converted(name: str, folder: Path) -> Path:
    return folder / f"{name}.safetensors"


def drill_sample(folder: Path, args: argparse.Namespace) -> list[dict]:
    """One run from prompt to MP4."""
    for name in PUBLISHED:
        if not converted(name, folder).is_file():
            source = folder / NAMES[name]
            apart("write_published(sys.argv[1], Path(sys.argv[2]))", name, source)
            measured(f"{name}: convert", "-m", "rcm_jax.convert", source, converted(name, folder))
            source.unlink()
    write_tokenizer(folder / "google" / "umt5-xxl")
    video = folder / "drill.mp4"
    row = measured(
        f"sample: {args.size}, {args.num_frames} frames, 2 steps, {args.dtype}", "-m", "rcm_jax.sample", "--dit_path",
        converted("dit", folder), "--kind", "student", "--num_steps", "2", "--size", args.size, "--num_frames",
        str(args.num_frames), "--dtype", args.dtype, "--prompt", "a red fox in the snow", "--save_path", video,
    )  # fmt: skip
    return [row | {"file_gb": video.stat().st_size / 1e9}]


def table(rows: list[dict]) -> str:
    lines = ["| step | seconds | peak memory, GB | file, GB |", "|---|---|---|---|"]
    for row in rows:
        size = f"{row['file_gb']:.2f}" if row["file_gb"] > 0.01 else ""
        lines.append(f"| {row['step']} | {row['seconds']:.0f} | {row['peak_gb']:.2f} | {size} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", nargs="+", choices=(*PUBLISHED, "sample"), default=[*PUBLISHED, "sample"])
    p.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "rcm_jax_drill"), help="needs 45 GB for all parts"
    )
    p.add_argument("--size", default="64x64", help="of the sampled video, width x height")
    p.add_argument("--num_frames", type=int, default=5)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the sampling run")
    p.add_argument("--keep", action="store_true", help="leave the files")
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    where = machine("jax", "numpy")
    rows = []
    for part in args.parts:
        rows += drill_sample(args.folder, args) if part == "sample" else drill_part(part, args.folder, args.keep)
    print(table(rows))
    print(where)
    write_json(args.json, {"machine": where, "rows": rows})
    if not args.keep:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
