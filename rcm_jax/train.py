"""Trains a recipe: python -m rcm_jax.train --config=toy_rcm --workdir=runs/toy_rcm

A recipe is one of the package's, by its name, or a file of your own, --config=my/recipe.py; NAME:ARGUMENT where it
takes one. Every setting can be changed from here, e.g. --config.optimizer.lr=1e-4 --config.method.consistency=dcm
--config.seed=1. The workdir gets config.json, metrics.jsonl, tensorboard/, checkpoints/, samples/ (with
--config.sample_every=N, of --config.previews.prompts) and, at the end, the averaged weights as student.safetensors
(teacher.safetensors for method "diffusion"); weights/STEP/ has them on the way with --config.weights_every=N. With
--config.lora.rank=N that is a LoRA, student_lora.safetensors, which `rcm_jax.convert merge` adds to its base. The same
command again resumes from the newest checkpoint and gives the same numbers as a run that was never stopped; SIGTERM
saves and exits with code 143. --dry_run prints parameters and bytes per device and stops; with --gpu h100 it compiles
the steps for --devices such GPUs, which need not be here, as rcm_jax.plan does.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcm_jax import xla_flags
from rcm_jax.cli import command_parser, one_line_errors
from rcm_jax.options import add_options, taken
from rcm_jax.recipes import read_config, recipes
from rcm_jax.training.host_options import HostOptions

if TYPE_CHECKING:
    from rcm_jax.training.config import RunConfig


def parser() -> argparse.ArgumentParser:
    p = command_parser("train", __doc__)
    p.add_argument("--config", required=True, metavar="RECIPE", help=f"one of {', '.join(recipes())}; or a file")
    p.add_argument("--workdir", type=Path, help="where the run lives; made if it is not there")
    p.add_argument("--resume", default="auto", metavar="auto|STEP|no", help="go on from the newest checkpoint if there "
                   "is one (default), or from that of a step, or fail where there are any")  # fmt: skip
    add_options(p.add_argument_group("several hosts, one command each"), HostOptions)
    p.add_argument("--dry_run", action="store_true", help="print what the run would take, allocate and write nothing")
    p.add_argument("--devices", type=int, default=0, help="with --dry_run: how many to plan for (default: those here)")
    p.add_argument("--gpu", help="with --dry_run: compile for this GPU: h100, h200, a100, b200 or rtx_4090")
    p.add_argument("--profile_steps", metavar="START:STOP", help="trace these steps into WORKDIR/profile; STOP is not")
    xla_flags.add_flag(p)
    return p


def run(args: argparse.Namespace, changes: Sequence[str]) -> str:
    """What the command prints. Imports late, so that --help and errors of flags are immediate."""
    config = read_config(args.config, changes)
    if args.devices < 0 or (args.devices and not args.dry_run):
        raise ValueError(f"--devices={args.devices} is a number of devices to plan for, with --dry_run")
    if args.gpu and not args.dry_run:
        raise ValueError(f"--gpu={args.gpu} is a GPU to plan for, with --dry_run")
    if not args.dry_run and args.workdir is None:
        raise ValueError("--workdir is missing: say where the run lives, e.g. --workdir=runs/mine")
    xla_flags.apply(args.xla_flags)

    from rcm_jax.configs.base import run_config
    from rcm_jax.outputs import check_folder
    from rcm_jax.pipelines.preview import open_previews
    from rcm_jax.training import runs
    from rcm_jax.training.hosts import hosts_of_a_run
    from rcm_jax.training.profiling import parse_steps
    from rcm_jax.training.resume import parse_resume

    config = run_config(config)
    hosts = HostOptions(**taken(vars(args), HostOptions))
    resume = parse_resume(args.resume)
    traced = parse_steps(args.profile_steps, config.steps) if args.profile_steps else None
    if args.dry_run and args.gpu:
        return _compiled(config, args.gpu, args.devices)
    if args.dry_run:
        return runs.plan(config, args.devices)
    check_folder(args.workdir, "workdir")
    with hosts_of_a_run(hosts):
        previews = open_previews if config.sample_every else None
        saved = runs.train_recipe(config, args.workdir, open_samples=previews, resume=resume, profile_steps=traced)
        return f"weights: {saved}" + f", a LoRA of {config.init or config.teacher}" * bool(config.lora.rank)


def _compiled(config: "RunConfig", gpu: str, devices: int) -> str:
    """What `rcm_jax.plan` says of the run."""
    from rcm_jax.aot.compile import no_gpus
    from rcm_jax.aot.gpus import find_gpu
    from rcm_jax.training import planning

    no_gpus()
    return planning.plan(config, find_gpu(gpu), devices or None).text()


def main(argv: Sequence[str] | None = None) -> None:
    """The command; installed as rcm-train."""
    from absl import logging

    logging.set_verbosity(logging.FATAL)  # Orbax prints the traces of what is told in a line here
    args, changes = parser().parse_known_args(argv)
    with one_line_errors():
        print(run(args, changes))


if __name__ == "__main__":
    main()
