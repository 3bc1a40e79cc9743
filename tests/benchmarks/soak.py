"""A run that is killed again and again ends as one that never was:

    python -m tests.benchmarks.soak --out soak --minutes 30 --steps 4000

Two processes with a CPU device each train a tiny network on the built-in world, its weights over both. Every 20 to 60
seconds one of them gets SIGKILL, or SIGTERM, and both are started again; after `minutes` they are left to end. Before
that the same steps run once undisturbed. Compared are all records of metrics.jsonl and the weights, bit for bit.

A life must be longer than its start, so the run has one kind of step (consistency alone) and XLA leaves out most of
its optimisations: what is tried is what a run keeps, not what it computes.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np

from rcm_jax.model_file import ModelInfo, load_model, save_model
from rcm_jax.training.metrics import read_metrics
from tests.hosts import finish, said, start
from tests.tiny import MODEL, perturbed_params


def flags(steps: int) -> list[str]:
    return [f"--config.steps={steps}", "--config.checkpoint_every=25", "--config.log_every=5", "--host_lost_after=5",
            "--config.mesh.fsdp=2", "--config.method.dmd_scale=0"]  # fmt: skip


def started(teacher: Path, workdir: Path, steps: int) -> list[subprocess.Popen]:
    return start(teacher, workdir, *flags(steps), hosts=2, devices=2)


def undisturbed(teacher: Path, workdir: Path, steps: int) -> None:
    assert finish(started(teacher, workdir, steps), timeout=7200) == [0, 0], said(workdir).read_text()


def disturbed(teacher: Path, workdir: Path, steps: int, minutes: float, seed: int) -> list[dict]:
    """What was done to the run, one record a life."""
    rng, lives, end = random.Random(seed), [], time.monotonic() + 60 * minutes
    while True:
        processes, began = started(teacher, workdir, steps), time.monotonic()
        life = rng.uniform(20, 60) if began < end else float("inf")
        while all(p.poll() is None for p in processes) and time.monotonic() < began + life:
            time.sleep(0.1)
        victim, number = rng.randrange(2), rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        early = [p.poll() for p in processes if p.poll() is not None]
        if not early:
            processes[victim].send_signal(number)
        codes = finish(processes, timeout=7200)
        record = {"seconds": round(time.monotonic() - began), "codes": codes, "records": len(read_metrics(workdir))}
        lives.append(record | ({} if early else {"signal": number.name, "host": victim}))
        print(json.dumps(lives[-1]), flush=True)
        if codes == [0, 0]:
            return lives
        if early:
            raise SystemExit(f"a life ended by itself: {said(workdir).read_text()[-2000:]}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=30)
    p.add_argument("--steps", type=int, default=4000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    teacher = save_model(
        out / "teacher.safetensors", perturbed_params(MODEL, 7), ModelInfo(MODEL, "teacher", "toy", (9, 6, 6))
    )
    undisturbed(teacher, out / "whole", args.steps)
    lives = disturbed(teacher, out / "cut", args.steps, args.minutes, args.seed)
    whole, cut = read_metrics(out / "whole"), read_metrics(out / "cut")
    weights = [load_model(out / name / "student.safetensors")[0] for name in ("whole", "cut")]
    equal = jax.tree.leaves(jax.tree.map(np.array_equal, *weights))
    summary = {
        "lives": len(lives), "kills": sum(life.get("signal") == "SIGKILL" for life in lives), "steps": args.steps,
        "records equal": whole == cut, "weights equal": all(equal), "seconds": sum(life["seconds"] for life in lives),
    }  # fmt: skip
    (out / "soak.json").write_text(json.dumps({"summary": summary, "lives": lives}, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
