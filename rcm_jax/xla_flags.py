"""What is settled before JAX starts its devices: XLA's flags, for training on many GPUs by name or in full, and what
commands do by themselves on CPUs, flags and a number of devices.

An unknown flag makes XLA end the process, so a child tries them first, and what it says becomes one line.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import subprocess
import sys

from rcm_jax.compilation import cache_folder
from rcm_jax.errors import ArgumentError

SETS = {
    "none": "",
    # a layer's weights and gradients travel one by one, not in bundles that wait for their last part (docs/training.md)
    "overlap": "--xla_gpu_all_gather_combine_threshold_bytes=1 --xla_gpu_reduce_scatter_combine_threshold_bytes=1",
}
# products by a library of its own: a gradient takes 4 to 20% less; and what LLVM does beyond its first level costs a
# quarter of the compiling and makes nothing faster (docs/results.md, sections 6 and 15)
ON_CPUS = ("--xla_cpu_experimental_ynn_fusion_type=individual_dot", "--xla_backend_optimization_level=1")
COUNT = "--xla_force_host_platform_device_count"
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
        _set(flags)


def suit_cpus() -> None:
    """Sets ON_CPUS for this process, if it will compute on CPUs. Not those that the user has set, and none where the
    installed XLA does not know all."""
    there = os.environ.get("XLA_FLAGS", "")
    flags = " ".join(flag for flag in ON_CPUS if flag.split("=")[0] not in there)
    if flags and on_cpus() and _known(" ".join(ON_CPUS)):
        _set(flags)


def share_cpus() -> None:
    """Makes two devices of the CPUs, each with half of the cores, over which a run divides its batch: small networks do
    not keep all cores busy with one product after the other. Not where the user has said how many there are."""
    if not on_cpus() or (os.cpu_count() or 1) == 1 or COUNT in os.environ.get("XLA_FLAGS", ""):
        return
    import jax

    if jax.config.jax_num_cpu_devices == -1:  # so it is without JAX_NUM_CPU_DEVICES
        jax.config.update("jax_num_cpu_devices", 2)


def on_cpus() -> bool:
    """Whether this process will compute on CPUs: as JAX_PLATFORMS says, or because no other device's plugin is
    installed. Asked before JAX starts its devices."""
    return (os.environ.get("JAX_PLATFORMS") or ("" if importlib.util.find_spec("jax_plugins") else "cpu")) == "cpu"


def _set(flags: str) -> None:
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()


def _known(flags: str) -> bool:
    """Whether the installed XLA takes them. The answer is kept beside the compiled programs, a file for each jaxlib."""
    import jaxlib

    folder = cache_folder()
    kept = folder and folder / f"flags_of_jaxlib_{jaxlib.__version__}"
    if kept and kept.is_file():
        answer, _, asked = kept.read_text().partition(" ")
        if asked == flags:
            return answer == "takes"
    known = _child(flags).returncode == 0
    if kept:
        with contextlib.suppress(OSError):  # a cache that cannot be written is no error: the child is asked again
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(f"{'takes' if known else 'refuses'} {flags}")
    return known


def _child(flags: str) -> subprocess.CompletedProcess:
    """A process that starts XLA with them."""
    return subprocess.run(
        [sys.executable, "-c", TRY], env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip


def _try(flags: str, given: str) -> None:
    child = _child(flags)
    if child.returncode == 0:
        return
    unknown = re.findall(r"Unknown flags? in XLA_FLAGS: (.*)", child.stderr)
    why = f"it does not know {unknown[0].strip()}" if unknown else "a value is not one of its flag"
    raise ArgumentError(f"{{xla_flags}} must be flags that the installed XLA takes: {why}", xla_flags=given)
