"""Benchmarks, run by hand: what they share is timing in turn, peak memory, and saying on what machine it was.

python -m tests.benchmarks.torch_dit --help        python -m tests.benchmarks.one_pass --help
"""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np


def machine(*packages: str) -> dict:
    """CPU, cores this process may use, load, and the versions of the packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: importlib.metadata.version(name) for name in packages}
    load, flags = round(os.getloadavg()[0], 2), os.environ.get("XLA_FLAGS", "none")
    where = {"cpu": model, "cores": cores, "load_1min": load, "XLA_FLAGS": flags, "python": platform.python_version()}
    return where | versions


def time_in_turn(functions: dict[str, Callable], rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds of each function in each round: A B C, C B A, A B C, …, so that a slow spell of the machine hits all.

    A round's number is the median of `calls` calls after one that does not count (caches and thread pools warm up
    again after another library has run). Functions must not return before their work is done.
    """
    seconds = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            functions[name]()
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                functions[name]()
                times.append(time.perf_counter() - start)
            seconds[name].append(statistics.median(times))
    return seconds


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median, least and greatest of a/b, round by round."""
    values = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(values), min(values), max(values)


def relative(a, b) -> float:
    """‖a - b‖ / ‖b‖ over all elements, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def peak_memory(function: Callable) -> int:
    """Bytes by which one call raises this process's resident memory at its highest (Linux). Warm up before."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what compilation freed must not hide the call's own memory

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    function()
    return status("VmHWM") - before


def spread(r: tuple[float, float, float]) -> str:
    return f"{r[0]:.2f} [{r[1]:.2f}, {r[2]:.2f}]"


def write_json(path: Path | None, result: dict) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def abstract_gpu() -> contextlib.AbstractContextManager:
    """For lowering kernels without a GPU: jax 0.11 asks the mesh which GPU it is for."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))
