"""Compiles programs for GPUs that are not here.

    with jax.set_mesh(make_mesh(fsdp=8, devices=absent("h100", 8))):
        program = compile_for(function, *arguments)             # shapes with shardings over the mesh

XLA's CUDA plugin does it, without CUDA: partitioner, scheduler, buffers, Triton and ptxas run as they would there.
Nothing can be timed, so nothing is autotuned: matrix products get a default tile. Needs an extra:
pip install 'rcm_jax[aot]'.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from rcm_jax.aot.gpus import Gpu, find_gpu

HOW = "pip install 'rcm_jax[aot]'"
GPUS_A_HOST = 8
# XLA's own level, whatever this process has set for its CPUs; and that PTX is dumped too has to be said since 0.11
OPTIONS = {"xla_backend_optimization_level": 3}
if jax.__version_info__ >= (0, 11):
    OPTIONS["xla_dump_emitter_re"] = "ptx"


def no_gpus() -> None:
    """Leaves this process's GPUs alone, and lets the plugin load where there is none. Call it before JAX starts."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else the plugin tells thrice that it found no driver
    jax.config.update("jax_platforms", "cpu")


def check_plugin() -> None:
    """Raises RuntimeError, with what to install, unless the plugin is there in the version of this jax."""
    found = {}
    for name in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if not found:
        raise RuntimeError(f"compiling for a GPU needs XLA's CUDA plugin: {HOW}")
    if jax.__version__ not in found.values():
        name, version = next(iter(found.items()))
        raise RuntimeError(
            f"{name} {version} does not fit jax {jax.__version__}: pip install '{name}=={jax.__version__}'"
        )


def absent(gpu: str | Gpu, count: int) -> list[jax.Device]:
    """So many GPUs that are not here, eight a host where that divides them: for meshes that programs are compiled for.

    Raises ValueError for a GPU that is not known, RuntimeError as `check_plugin`.
    """
    gpu = find_gpu(gpu) if isinstance(gpu, str) else gpu
    check_plugin()
    return list(_devices(gpu, count))


@functools.cache
def _devices(gpu: Gpu, count: int) -> tuple[jax.Device, ...]:
    local = GPUS_A_HOST if count % GPUS_A_HOST == 0 else count
    shape = f"1x{count // local}x{local}"  # slices x hosts x GPUs a host
    return tuple(topologies.get_topology_desc("", platform="cuda", target_config=gpu.target, topology=shape).devices)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: the text of its scheduled HLO, live ranges, launches, and PTX by the name of its kernel."""

    hlo: str
    live_ranges: str
    launches: str  # a line for each launch: of a kernel its grid, threads and bytes of shared memory
    ptx: dict[str, str]
    seconds: float  # that lowering and compiling took
    arguments: int  # bytes on a device
    outputs: int  # bytes that no argument's memory is used again for
    temporaries: int  # bytes
    output_shardings: Any = None  # of the function's result, leaf by leaf

    @property
    def peak(self) -> int:
        """Bytes that a device needs while the program runs: XLA takes all its temporaries in one piece."""
        return self.arguments + self.outputs + self.temporaries


def compile_for(function: Callable, *arguments: Any, **named: Any) -> Program:
    """Compiles a function for the mesh that is set, of `absent` GPUs. Arguments are arrays or shapes with shardings."""
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    with tempfile.TemporaryDirectory(prefix="rcm_jax_aot_") as folder, _nothing_kept():
        began = time.perf_counter()
        with warnings.catch_warnings():  # donation is not in use where programs are only compiled
            warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
            compiled = jitted.lower(*arguments, **named).compile(compiler_options={"xla_dump_to": folder} | OPTIONS)
        seconds, stats = time.perf_counter() - began, compiled.memory_analysis()
        return Program(
            hlo=compiled.as_text(),
            live_ranges=_largest(folder, "*optimizations-live-range.txt"),
            launches=_largest(folder, "*thunk_sequence.txt"),
            ptx={name: text for path in Path(folder).glob("*.ptx") for name, text in _entries(path.read_text())},
            seconds=seconds,
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            output_shardings=compiled.output_shardings,
        )


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    """Without the cache of compiled programs: one that is taken from it leaves no dump."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def _largest(folder: str, pattern: str) -> str:
    """The text of the longest such file: small programs that are compiled on the way dump too."""
    return max((path.read_text() for path in Path(folder).glob(pattern)), key=len, default="")


def _entries(ptx: str) -> Iterator[tuple[str, str]]:
    """The kernels of a PTX module by name, each with the whole module, which is what the assembler takes."""
    for name in re.findall(r"^\.visible \.entry (\w+)", ptx, re.MULTILINE):
        yield name, ptx
