"""Every published recipe on 8 to 64 GPUs: python -m tests.benchmarks.plan_table --out plans.jsonl [--recipes …]

Compiles every step with the batch cut so that each GPU, or each group of those that share a video, has one video at a
time, weights over as many as the recipe says. Prints a row as soon as it is there, and does not make one again that is
in --out. Nothing is run: peak memory, what is sent, and the part of its least time during which nothing computes.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from rcm_jax.aot.compile import no_gpus
from rcm_jax.aot.gpus import find_gpu, usable
from rcm_jax.aot.report import gib
from rcm_jax.configs.base import run_config
from rcm_jax.recipes import read_config
from rcm_jax.training import planning
from rcm_jax.training.config import RunConfig
from rcm_jax.training.schedule import step_names

RECIPES = (
    "wan_1_3b_rcm", "wan_14b_rcm", "wan_1_3b_causal_tf", "wan_1_3b_causal_df", "wan_14b_causal_tf", "wan_14b_causal_df",
    "wan_1_3b_causal_tf_scm", "wan_1_3b_causal_tf_scm_14b", "wan_1_3b_causal_tf_dcm", "wan_1_3b_causal_tf_dcm_14b",
    "wan_1_3b_causal_sf_dmd", "wan_1_3b_causal_sf_dmd_14b", "wan_14b_i2v_rcm", "wan22_i2v_high_rcm",
    "wan22_i2v_low_rcm",
)  # fmt: skip
COUNTS = (8, 16, 32, 64)


def on(config: RunConfig, count: int) -> RunConfig:
    """The recipe for so many GPUs: weights over as many as it says, if there are as many."""
    videos = count // config.mesh.sequence
    fsdp = min(config.mesh.fsdp, videos)
    mesh = dataclasses.replace(config.mesh, data=videos // fsdp, fsdp=fsdp)
    return dataclasses.replace(config, mesh=mesh, microbatches=config.data.batch_size // videos)


def line(record: dict) -> str:
    report = record["report"]
    room = {name: usable(find_gpu(name).memory) for name in ("h100", "h200")}
    fits = " | ".join("yes" if report["peak"] <= room[name] else "**no**" for name in room)
    return (
        f"| {record['recipe']} | {report['name']} | {report['devices']} | {gib(report['peak'])} | {fits} | "
        f"{report['flops'] / 1e15:.2f} | {gib(report['sent'])} | {report['uncovered']:.0%} | "
        f"{report['compile_seconds']:.0f} |"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, metavar="RECIPE")
    p.add_argument("--gpus", nargs="+", type=int, default=COUNTS, metavar="N")
    p.add_argument("--gpu", default="h100")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    no_gpus()
    done = [json.loads(row) for row in args.out.read_text().splitlines()] if args.out.exists() else []
    print("| recipe | step | GPUs | GiB | H100 | H200 | PFLOP | sent GiB | not covered | compiled in s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in args.recipes:
        config = run_config(read_config(name, []))
        for count in args.gpus:
            for step in step_names(config.method):
                key = [name, step, count, args.gpu]
                record = next((r for r in done if r["key"] == key), None)
                if record is None:
                    plan = planning.plan(on(config, count), find_gpu(args.gpu), count, step=step)
                    record = {"key": key, "recipe": name, "report": plan.reports[0].to_dict()}
                    with args.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                print(line(record), flush=True)


if __name__ == "__main__":
    main()
