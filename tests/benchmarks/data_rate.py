"""How fast shards of the published format are read at Wan's sizes, against how fast an H100 consumes them.

    python -m tests.benchmarks.data_rate --minutes 60

Writes shards of bfloat16 triples (latents [16, 21, 60, 104], text [512, 4096], prompt), 8.4 MB a sample, to a temporary
folder (under --folder), and reads batches of them as a run would, shuffled, epoch after epoch: unpickled, checked,
turned to channels last, stacked. The files lie in the page cache if they fit there: this is the reader's own rate, not
a disk's. What one H100 consumes is the operations of the recipe's steps for a video at --mfu of 989 TFLOP/s.
"""

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ml_dtypes
import numpy as np

from rcm_jax.aot.gpus import find_gpu
from rcm_jax.configs.base import run_config
from rcm_jax.data.config import DataConfig
from rcm_jax.data.source import batches, make_source
from rcm_jax.recipes import read_config
from rcm_jax.training.config import RunConfig
from rcm_jax.training.flops import peak, step_flops
from tests.benchmarks import machine, write_json
from tests.data.published import triple, write_tar

LATENTS, TEXT = (16, 21, 60, 104), (512, 4096)
NULL = "null.npy"


def write_set(folder: Path, samples: int, per_shard: int) -> None:
    rng, bfloat16 = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
    for shard, start in enumerate(range(0, samples, per_shard)):
        members = []
        for i in range(start, min(start + per_shard, samples)):
            latents = rng.standard_normal(LATENTS, np.float32).astype(bfloat16)
            text = rng.standard_normal(TEXT, np.float32).astype(bfloat16)
            members += triple(f"{i:09d}", latents, text, f"a prompt that is number {i}").items()
        write_tar(folder / f"shard_{shard:06d}.tar", members)
    np.save(folder / NULL, np.ones((2, TEXT[1]), np.float32))


def resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3


def consumed(config: RunConfig, mfu: float) -> tuple[float, float]:
    """Operations for a video, mean over the schedule, and videos a second of one GPU."""
    steps = range(config.method.tangent_warmup, config.method.tangent_warmup + 500)
    video = sum(step_flops(config, step) for step in steps) / len(steps) / config.data.batch_size
    return video, mfu * peak(find_gpu("h100").device_kind) / video


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=1.0)
    p.add_argument("--samples", type=int, default=128, help="of the set")
    p.add_argument("--per_shard", type=int, default=16)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--threads", type=int, default=DataConfig.threads)
    p.add_argument("--mfu", type=float, default=0.4)
    p.add_argument("--folder", help="where the set goes")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    config = run_config(read_config("wan_1_3b_rcm", []))
    flops, rate = consumed(config, args.mfu)
    print(
        f"one H100: {flops / 1e15:.2f} PFLOP a video of {config.data.latent_shape}, mean of the steps; at "
        f"{args.mfu:.0%} of {peak(find_gpu('h100').device_kind) / 1e12:.0f} TFLOP/s {rate:.3f} videos/s"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_set(Path(folder), args.samples, args.per_shard)
        data = DataConfig(
            "shards", path=folder, null_text=f"{folder}/{NULL}", batch_size=args.batch, threads=args.threads,
            latent_shape=config.data.latent_shape,
        )  # fmt: skip
        start = time.perf_counter()
        source = make_source(data, 0, config.model)
        print(f"opened {source.about['samples']} samples in {time.perf_counter() - start:.2f} s")
        read = batches(source, 0, 1 << 40, range(args.batch))
        size = sum(x.nbytes for x in (next(read).latents, next(read).text))
        for _ in range(4):  # buffers are full
            next(read)
        first, highest, bar = resident(), 0.0, args.minutes / 10
        began = last = time.perf_counter()
        for count in itertools.count(1):
            next(read)
            now, here = time.perf_counter() - began, resident()
            highest = max(highest, here)
            if time.perf_counter() - last > 60 * bar:
                last = time.perf_counter()
                print(f"  {now / 60:6.1f} min  {count * args.batch / now:6.1f} samples/s  resident {here:.0f} MB")
            if now > 60 * args.minutes:
                break
        samples = count * args.batch / now
        result = {
            "samples_per_s": samples, "MB_per_s": count * size / now / 1e6, "minutes": now / 60,
            "resident_MB": {"start": first, "end": here, "highest": highest}, "H100_videos_per_s": rate,
            "times_an_H100": samples / rate, "machine": machine("numpy", "grain"),
        }  # fmt: skip
        print(
            f"{samples:.1f} samples/s, {result['MB_per_s']:.0f} MB/s: {samples / rate:.0f} times what one H100 takes; "
            f"resident {first:.0f} MB at the start, {here:.0f} at the end, {highest:.0f} at most; {result['machine']}"
        )
        write_json(args.json, result)


if __name__ == "__main__":
    main()
