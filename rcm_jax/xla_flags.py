"""XLA's flags for training on many GPUs, given by name or in full; set before JAX starts its devices.

An unknown flag makes XLA end the process, so a child tries them first, and what it says becomes one line.
"""

import argparse
import os
import re
import subprocess
import sys

from rcm_jax.errors import ArgumentError

SETS = {
    "none": "",
    # a layer's weights and gradients travel one by one, not in bundles that wait for their last part (docs/training.md)
    "overlap": "--xla_gpu_all_gather_combine_threshold_bytes=1 --xla_gpu_reduce_scatter_combine_threshold_bytes=1",
}
TRY = "from jaxlib import xla_client; xla_client.make_cpu_client()"


def add_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--xla_flags", default="none", metavar="SET", help=f"{', '.join(SETS)} (default: none), or XLA's own flags"
    )


def resolve(given: str) -> str:
    """The flags of a set, or those that were given in full. Raises ArgumentError for a word that is neither, and for
    flags that the installed XLA does not take."""
    flags = SETS.get(given, given)
    if words := [word for word in flags.split() if not re.fullmatch(r"--xla_\w+(=\S*)?", word)]:
        raise ArgumentError(
            f"{{xla_flags}} must be one of {', '.join(SETS)}, or flags of XLA (--xla_NAME=VALUE), which {words[0]!r} "
            "is not", xla_flags=given,
        )  # fmt: skip
    if flags:
        _try(flags, given)
    return flags


def apply(given: str) -> None:
    """Sets the flags for this process, before those of XLA_FLAGS, which win. Call it before JAX starts its devices."""
    if flags := resolve(given):
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()


def _try(flags: str, given: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", TRY], env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    if child.returncode == 0:
        return
    unknown = re.findall(r"Unknown flags? in XLA_FLAGS: (.*)", child.stderr)
    why = f"it does not know {unknown[0].strip()}" if unknown else "a value is not one of its flag"
    raise ArgumentError(f"{{xla_flags}} must be flags that the installed XLA takes: {why}", xla_flags=given)
