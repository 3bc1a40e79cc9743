"""rCM on the built-in world by LoRA against the whole network: python -m tests.benchmarks.lora_toy --out lora_toy

Trains the recipe `toy_rcm` whole and by LoRA of rank 8 and 32, for three seeds each, and scores every student in 4, 2
and 1 steps as the demo does. A JSON line a student goes to OUT/scores.jsonl as soon as it is there; what is in it is
not made again, and a run that was stopped goes on from its checkpoint. At the end the means over the seeds, with the
least and the greatest. A LoRA learns with the recipe's rates times --lr_factor: what is near zero has further to go.
"""

import argparse
import json
import time
from pathlib import Path

from rcm_jax.configs import toy_rcm
from rcm_jax.configs.base import run_config
from rcm_jax.convert.commands import main as convert
from rcm_jax.pipelines.pipeline import load
from rcm_jax.pipelines.scoring import Table, row_passes, sample_row
from rcm_jax.training.config import RunConfig
from rcm_jax.training.runs import train_recipe
from rcm_jax.worlds.builtin import find_model
from rcm_jax.worlds.toy.scores import evaluation_prompts
from tests.benchmarks import machine

STEPS = (4, 2, 1)  # of the sampler


def recipe(rank: int, seed: int, steps: int | None, lr_factor: float) -> RunConfig:
    config = toy_rcm.get_config()
    config.update({"seed": seed, "tensorboard": False, "keep": 1, "checkpoint_every": 100})
    config.lora.rank = rank
    if rank:
        config.optimizer.lr *= lr_factor
        config.optimizer.lr_fake *= lr_factor
    if steps is not None:
        config.steps = steps
    return run_config(config)


def student(config: RunConfig, workdir: Path, label: str) -> Path:
    """The run's weights; of a LoRA their sum with the teacher's."""
    left = train_recipe(config, workdir, progress=label)
    if not config.lora.rank:
        return left
    whole = workdir / "student.safetensors"
    flags = ["--dtype", "float32", "--overwrite"]  # the teacher's file is in less
    convert(["merge", str(find_model(config.teacher)), str(whole), "--lora", str(left), *flags])
    return whole


def scores(path: Path, per_caption: int) -> dict[str, dict]:
    """Of the student in so many steps: every score, with its interval."""
    prompts, pipe, table = evaluation_prompts(per_caption), load(path), Table()
    for n in STEPS:
        videos = sample_row(pipe, prompts, [1], num_steps=n, label="")
        table.add(str(n), [videos], prompts, passes=row_passes(pipe, num_steps=n))
    return table.rows


def summary(records: list[dict]) -> str:
    """Mean of `all` over the seeds, with the least and the greatest."""
    lines = [f"{'':10}" + "".join(f"{f'{n} steps':>22}" for n in STEPS)]
    for name in dict.fromkeys(r["name"] for r in records):
        cells = []
        for n in STEPS:
            values = [r["scores"][str(n)]["all"]["value"] for r in records if r["name"] == name]
            cells.append(f"{sum(values) / len(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
        lines.append(f"{name:10}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--ranks", type=int, nargs="+", default=[0, 8, 32], help="0: the whole network")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, help="of training (default: the recipe's)")
    p.add_argument("--lr_factor", type=float, default=2.0)
    p.add_argument("--per_caption", type=int, default=4, help="videos for each of 48 captions")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "scores.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in args.seeds:
        for rank in args.ranks:
            name = f"rank {rank}" if rank else "full"
            factor = args.lr_factor if rank else 1.0
            key = [name, seed, args.steps, factor, args.per_caption]
            if any(r["key"] == key for r in records):
                continue
            began, label = time.monotonic(), f"{name}, seed {seed}"
            workdir = args.out / f"{name.replace(' ', '')}-seed{seed}-lr{factor:g}-{args.steps or 'all'}"
            path = student(recipe(rank, seed, args.steps, factor), workdir, label)
            trained = time.monotonic()
            found = scores(path, args.per_caption)
            seconds = {"train": round(trained - began), "score": round(time.monotonic() - trained)}
            records.append(
                {"key": key, "name": name, "seed": seed, "scores": found, "seconds": seconds} | machine("jax")
            )
            with file.open("a") as out:
                out.write(json.dumps(records[-1]) + "\n")
    print(summary(records))


if __name__ == "__main__":
    main()
