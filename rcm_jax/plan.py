"""Plans a run on GPUs that are not here: python -m rcm_jax.plan --config=wan_14b_rcm --mesh fsdp=64 --gpu h100

Compiles the recipe's steps, to the end, for the GPUs of the mesh, and prints for each what a GPU would hold at most,
what it would send and compute, and which attention kernels it would run. --step takes one of the steps. --fit tries
meshes, cuts of the batch and what the backward pass computes again, the cheapest first, until all steps fit, and prints
the table. Nothing runs, so no time is said of anything but of the compiler. Exit code 2: the recipe does not fit; the
last line says what would. Settings are changed as for training: --config.data.batch_size=32.
Needs: pip install 'rcm_jax[aot]'
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcm_jax import xla_flags
from rcm_jax.aot.compile import no_gpus
from rcm_jax.cli import command_parser, number, one_line_errors
from rcm_jax.ranges import at_least

if TYPE_CHECKING:
    from rcm_jax.training.planning import Plan

DOES_NOT_FIT = 2


def parser() -> argparse.ArgumentParser:
    p = command_parser("plan", __doc__)
    p.add_argument("--config", required=True, metavar="RECIPE", help="as for rcm_jax.train")
    p.add_argument("--gpu", required=True, help="h100, h200, a100, b200, rtx_4090")
    p.add_argument("--mesh", nargs="+", default=[], metavar="AXIS=N", help="of data, fsdp, sequence (the recipe's)")
    p.add_argument("--gpus", type=number(int, at_least(1)), metavar="N", help="how many (default: the mesh's)")
    p.add_argument("--step", help="student, student_dmd, critic or diffusion (default: all that the run has)")
    p.add_argument("--fit", action="store_true", help="search for the cheapest way that fits, and print a table")
    p.add_argument("--json", type=Path, help="write everything here too")
    xla_flags.add_flag(p)
    return p


def run(args: argparse.Namespace, changes: Sequence[str]) -> int:
    """Prints; returns the exit code. Imports late, so that --help and errors of flags are immediate."""
    from rcm_jax.aot.gpus import find_gpu
    from rcm_jax.configs.base import run_config
    from rcm_jax.outputs import check_output
    from rcm_jax.recipes import read_config
    from rcm_jax.training import planning

    gpu, mesh = find_gpu(args.gpu), planning.parse_mesh(args.mesh)
    xla_flags.apply(args.xla_flags)
    if args.json:
        check_output(args.json, "json", (".json",))
    changes = [*changes, *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items())]
    config = run_config(read_config(args.config, changes))
    if args.fit:
        plans = planning.search(config, gpu, args.gpus, step=args.step, told=print)
        print(planning.table(plans))
        _write(args.json, plans)
        return 0 if any(plan.fits for plan in plans) else DOES_NOT_FIT
    plan = planning.plan(config, gpu, args.gpus, step=args.step, told=lambda report: print(report.text(), flush=True))
    _write(args.json, [plan])
    if plan.fits:
        return 0
    print(f"does not fit: {planning.what_fits(config, gpu, args.gpus, plan)}", file=sys.stderr)
    return DOES_NOT_FIT


def _write(path: Path | None, plans: "Sequence[Plan]") -> None:
    if path:
        path.write_text(json.dumps([plan.to_dict() for plan in plans], indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    args, changes = parser().parse_known_args(argv)
    with one_line_errors():
        no_gpus()
        sys.exit(run(args, changes))


if __name__ == "__main__":
    main()
