"""One clock for all that is compared: how long the device works on a call, whoever launches it.

On a GPU CUPTI tells the duration of every kernel that ran, of JAX, Triton and torch alike: the time of a run is their
sum, launches and the host left out. The L2 cache is overwritten before each run. On a CPU it is the clock on the wall.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

L2_BYTES = 256 * 2**20  # more than any GPU has
PACKAGES = ("jax", "jaxlib", "triton", "jax-triton", "jvp_flash_attention", "tokamax", "torch")
NVIDIA_SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


@dataclasses.dataclass(frozen=True)
class Ready:
    """A pass that can be run at once.

    run: launches, and returns what it makes, of JAX or of torch on the same device, without waiting for it.
    wait: until the device has done all. arrays: what `run` returned as arrays of JAX.
    facts: what a record says of it beside its times.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    arrays: Callable[[Any], Any] = lambda out: out
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


def clock() -> str:
    """What `milliseconds` reads: "CUPTI", or "host"."""
    return "CUPTI" if on_gpu() and _cupti() is not None else "host"


def milliseconds(ready: Ready, repeats: int) -> list[float]:
    """Times of so many runs, after two that do not count."""
    for _ in range(2):
        ready.wait(ready.run())
    return [_one(ready) for _ in range(repeats)]


def median(ready: Ready, repeats: int) -> float:
    return statistics.median(milliseconds(ready, repeats))


def _one(ready: Ready) -> float:
    if on_gpu():
        _flush()
    if clock() == "CUPTI":
        cupti = _cupti()
        cupti._cupti_init()
        try:
            ready.wait(ready.run())
        finally:
            kernels = cupti._cupti_get_timings(False)  # (name, ms) of each; False: it may be started again
        if not kernels:
            raise RuntimeError("CUPTI saw no kernel: is another profiler attached to this process?")
        return sum(ms for _, ms in kernels)
    began = time.perf_counter()
    ready.wait(ready.run())
    return 1e3 * (time.perf_counter() - began)


@functools.cache
def _cupti() -> Any:
    """What `jax.experimental.mosaic.gpu.profiler` times with; that one takes functions of JAX alone."""
    with contextlib.suppress(ImportError):
        from jax._src.lib import mosaic_gpu

        return getattr(mosaic_gpu, "_mosaic_gpu_ext", None)
    return None


def _flush() -> None:
    jax.block_until_ready(_overwritten(jnp.zeros((), jnp.int8)))


@jax.jit
def _overwritten(value: jax.Array) -> jax.Array:
    return jnp.broadcast_to(value + 1, (L2_BYTES,))


def matrix_rate(repeats: int) -> float:
    """TFLOP/s of one large bfloat16 product on this device: the roof, which shares are of."""
    n = 8192 if on_gpu() else 512
    a = jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16)
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    return 2 * n**3 / median(Ready(lambda: product(a, a)), repeats) / 1e9


def machine() -> dict[str, Any]:
    """The device, its driver and clocks as nvidia-smi tells them now, and versions of what is compared."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"device": jax.devices()[0].device_kind, "clock": clock(), "code": code(), **versions, **_cudnn(), **smi()}


@functools.cache
def code() -> str:
    """A name for the package's code as it is here: what another code measured is measured again."""
    whole, package = hashlib.sha256(), Path(__file__).parents[1]
    for folder, _, names in sorted(os.walk(package, followlinks=True)):
        for name in sorted(names):
            if name.endswith((".py", ".json")):
                whole.update(name.encode() + (Path(folder) / name).read_bytes())
    return whole.hexdigest()[:12]


def smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(NVIDIA_SMI, map(str.strip, told.split(",")), strict=False))


def _cudnn() -> dict[str, str]:
    for name in ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return {"cuDNN": importlib.metadata.version(name)}
    return {}
