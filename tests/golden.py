"""Checks the library against numbers of the public PyTorch code: python -m tests.golden PATH [PATH …]

A path is a golden file or a folder of them. One line a file: kind, worst relative error, the tolerance of the check
that came closest to its limit, ok or FAIL; below a FAIL, every check of the file. Exit code 1 on a FAIL, an unknown
kind or a file that cannot be read. Runs in x64: the public code works in float64 outside the network, and so do we.
"""

import argparse
import sys
from pathlib import Path

import jax

from rcm_jax.kernels.attention import BACKENDS
from tests import (
    golden_causal,
    golden_causal_losses,
    golden_encoders,
    golden_losses,
    golden_networks,
    golden_policies,
    golden_quant,
    golden_quant_sampler,
    golden_samplers,
    golden_tiny,
    golden_v2v,
)
from tests.golden_common import load_case, run_case

MODULES = (
    golden_networks, golden_causal, golden_causal_losses, golden_encoders, golden_losses, golden_policies, golden_quant,
    golden_quant_sampler, golden_samplers, golden_tiny, golden_v2v,
)  # fmt: skip
CASES = {kind: checker for module in MODULES for kind, checker in module.CASES.items()}


def _files(paths: list[Path]) -> list[Path]:
    return [file for path in paths for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])]


def _check(file: Path) -> bool:
    try:
        case = load_case(file)
        report = run_case(case, CASES)
    except Exception as error:  # one unreadable file must not hide the others
        print(f"FAIL {file.name}: {type(error).__name__}: {error}", flush=True)
        return False
    worst = report.worst()
    print(
        f"{'ok  ' if report.ok else 'FAIL'} {file.name:38s} {case.kind:22s} worst rel {worst.rel_error():.1e} "
        f"({worst.name}), {worst.share():6.1%} of its tolerance, {len(report.checks)} checks",
        flush=True,
    )
    if not report.ok:
        print(report)
    return report.ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--attention", default="auto", choices=("auto", *BACKENDS), help="backend of the networks")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    golden_networks.ATTENTION = args.attention
    files = _files(args.paths)
    results = [_check(file) for file in files]
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
