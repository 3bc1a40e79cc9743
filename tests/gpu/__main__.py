"""A day on a GPU, one stage a command: python -m tests.gpu --stage 1 --out output/gpu

1 kernels and goldens, right?   2 benchmark of four shapes   3 tiles   4 streaming   5 training steps   6 sampling
Each is planned for under eight minutes on an H100 and can be stopped: the same command goes on. --tiny runs the same
code at toy size, on a CPU too. Exit code 1 where a part failed. docs/gpu-day.md says what comes out.
"""

import argparse
import os
import sys
from pathlib import Path

import jax

from rcm_jax.outputs import check_folder
from tests.gpu import correctness, sampling, speed, streaming, tiles, training
from tests.gpu.parts import Context, run_parts

STAGES = {1: correctness, 2: speed, 3: tiles, 4: streaming, 5: training, 6: sampling}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--stage", type=int, required=True, choices=STAGES)
    p.add_argument("--out", type=Path, default=Path("output/gpu"), help="results go here (default: output/gpu)")
    p.add_argument("--tiny", action="store_true", help="at toy size: to see that a stage runs")
    p.add_argument("--rcm", type=Path, help="a checkout of github.com/NVlabs/rcm, for stage 2")
    args = p.parse_args(argv)
    if args.stage != 2 and not args.tiny:  # stage 2 leaves memory to torch
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # a student step takes 59 GiB
    if jax.devices()[0].platform != "gpu" and not args.tiny:
        p.error("there is no GPU here; --tiny runs the stage at toy size")
    args.out = check_folder(args.out, "out")
    args.out.mkdir(parents=True, exist_ok=True)
    context = Context(args.out, args.tiny, args.rcm)
    return 0 if run_parts(args.stage, STAGES[args.stage].parts(context), context) else 1


if __name__ == "__main__":
    sys.exit(main())
