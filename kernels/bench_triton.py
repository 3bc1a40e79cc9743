"""Published Triton kernels that give o and its tangent at once, launched by JAX on JAX's own buffers (jax_triton).

Their files import torch for what surrounds the kernel; none of that is used, so torch need not be there. Each kernel is
compiled with every configuration that its authors list, up to four stages, and the fastest on this GPU counts.
"""

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.kernels.bench_clock import Ready, median
from rcm_jax.kernels.bench_shapes import Shape
from rcm_jax.kernels.target import target

HOW = "pip install 'rcm_jax[bench]'"
RCM_FILE = "rcm/utils/flash_attention_jvp_triton.py"
UNUSED = ("torch", "torch.autograd", "torch.autograd.forward_ad", "torch.autograd.function", "flash_attn",
          "flash_attn.flash_attn_interface")  # fmt: skip
MAX_STAGES = 4
OPERANDS = ("q", "k", "v", "tq", "tk", "tv")

Launch = Callable[..., tuple[jax.Array, jax.Array]]  # (operands, BLOCK_M, BLOCK_N, num_warps, num_stages) -> o, to


def rcm(checkout: Path | None, shape: Shape) -> dict[str, Callable]:
    """The kernel of rCM's published code (NVlabs/rcm), in a checkout of it. Dense shapes only."""
    if checkout is None:
        raise NotImplementedError("give --rcm PATH, a checkout of github.com/NVlabs/rcm")
    if not (checkout / RCM_FILE).is_file():
        raise NotImplementedError(f"--rcm={checkout} has no {RCM_FILE}")
    _check(shape)
    kernel = load("rcm_published_kernel", checkout / RCM_FILE)._attn_fwd

    def launch(x: dict[str, jax.Array], block_q: int, block_k: int, warps: int, stages: int) -> tuple:
        sizes = {"B": shape.batch, "H": shape.heads, "SEQ_LEN_Q": shape.queries, "SEQ_LEN_KV": shape.keys,
                 "HEAD_DIM_QK": shape.width, "HEAD_DIM_V": shape.width}  # fmt: skip
        letters = {"q": "bhmd", "k": "bhnd", "v": "bhnd", "o": "bhmd"}
        strides = _strides(letters, {"q": x["q"], "k": x["k"], "v": x["v"], "o": x["q"]})
        return _call(kernel.fn, x, block_q, block_k, warps, stages, **sizes, **strides)

    return _fused(launch, kernel.configs)


def jvp_flash_attention(shape: Shape) -> dict[str, Callable]:
    """The kernel of the package of that name that takes pointers (its other one takes descriptors, which only torch
    can make). As many queries as keys, no mask; it looks at no ends, so only tiles that divide the tokens are safe."""
    found = importlib.util.find_spec("jvp_flash_attention")
    if found is None:
        raise ImportError("jvp_flash_attention is not installed: pip install --no-deps jvp_flash_attention")
    _check(shape)
    if shape.queries != shape.keys:
        raise NotImplementedError("it takes as many keys as queries")
    module = load("jvp_flash_published_kernel", Path(found.submodule_search_locations[0]) / "jvp_attention.py")

    def launch(x: dict[str, jax.Array], block_q: int, block_k: int, warps: int, stages: int) -> tuple:
        letters = {"q": "zhmk", "k": "zhnk", "v": "zhkn", "tq": "zhmk", "tk": "zhnk", "tv": "zhkn", "o": "zhmn",
                   "to": "zhmn"}  # fmt: skip
        strides = _strides(letters, dict.fromkeys(letters, x["q"])) | {f"stride_m{axis}": 0 for axis in "zhmn"}
        asked = {"Z": shape.batch, "H": shape.heads, "N_CTX": shape.queries, "HEAD_DIM": shape.width, "STAGE": 1,
                 "FP8_OUTPUT": False, "warp_specialize": False, "ENABLE_JVP": True, "ENABLE_DROPOUT": False,
                 "MASK_TYPE": 0, "Mask": None, "dropout_p": 0.0, "philox_seed": 0}  # fmt: skip
        return _call(module._attn_fwd, x, block_q, block_k, warps, stages, **asked, **strides)

    def fits(config: Any) -> bool:  # as its authors have it, and without running past the end
        q, k = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
        return q > 32 and k <= shape.width and module.keep(config) and shape.queries % q == shape.queries % k == 0

    configs = [config for config in module.configs if fits(config)]
    if not configs:
        raise NotImplementedError(f"none of its tiles divides {shape.queries} tokens; others run past the end")
    return _fused(launch, configs)


def _check(shape: Shape) -> None:
    """Raises NotImplementedError for a shape or a device that neither kernel takes, ImportError without Triton."""
    if shape.mask is not None:
        raise NotImplementedError("it has no such masks")
    if shape.width not in (16, 32, 64, 128, 256):
        raise NotImplementedError(f"heads {shape.width} wide; it takes powers of two")
    if not target().is_gpu:
        raise NotImplementedError("Triton's kernels need a GPU")
    for needed in ("jax_triton", "triton.testing", "triton.tools.tensor_descriptor"):
        try:
            importlib.import_module(needed)
        except ImportError as error:
            raise ImportError(f"{needed} is not installed: {HOW}") from error


def _strides(letters: dict[str, str], arrays: dict[str, jax.Array]) -> dict[str, int]:
    """Of [B, S, N, D] arrays read as [B, N, S, D]: stride_qb and so on, by the letters of a kernel's four axes."""
    out = {}
    for name, axes in letters.items():
        _, S, N, D = arrays[name].shape
        out |= {f"stride_{name}{axis}": stride for axis, stride in zip(axes, (S * N * D, D, N * D, 1), strict=True)}
    return out


def _call(kernel: Any, x: dict[str, jax.Array], block_q: int, block_k: int, warps: int, stages: int, **named: Any):
    """Both kernels take q, k, v, tq, tk, tv, the scale, then what they write: lse, o, to."""
    import jax_triton

    B, S, N, D = x["q"].shape
    device, out = target(), jax.ShapeDtypeStruct(x["q"].shape, x["q"].dtype)
    outs = jax.ShapeDtypeStruct((B, N, S), jnp.float32), out, out
    named["out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"] = outs
    _, o, to = jax_triton.triton_call(  # what its outputs are called differs between 0.3 and 0.4
        *(x[name] for name in OPERANDS), np.float32(D**-0.5), kernel=kernel, grid=(-(-S // block_q), B * N),
        num_warps=warps, num_stages=stages, compute_capability=round(10 * device.capability),
        BLOCK_M=block_q, BLOCK_N=block_k, **named,
    )  # fmt: skip
    return o, to


def _fused(launch: Launch, configs: list) -> dict[str, Callable]:
    choices = [
        (c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"], c.num_warps, c.num_stages)
        for c in configs
        if c.num_stages <= MAX_STAGES
    ]
    return {"forward+tangent": lambda x: fastest({c: compiled(launch, x, c) for c in choices})}


def compiled(launch: Launch, x: dict[str, jax.Array], choice: tuple[int, ...]) -> Callable[[], Ready]:
    """The kernel with one configuration, to be compiled when it is called."""

    def ready() -> Ready:
        run = jax.jit(lambda x: launch(x, *choice)).lower(x).compile()
        return Ready(lambda: run(x))

    return ready


def fastest(choices: dict[tuple[int, ...], Callable[[], Ready]]) -> Ready:
    """The fastest of those that compile and run. Raises RuntimeError, with the last reason, if none does."""
    best, why = None, None
    for choice, make in choices.items():
        try:
            ready = make()
            ms = median(ready, 3)
        except Exception as error:  # too much shared memory, a compiler's refusal: not a choice on this GPU
            why = error
            continue
        if best is None or ms < best[0]:
            best = ms, choice, ready
    if best is None:
        raise RuntimeError(f"none of its {len(choices)} configurations runs: {why}")
    block_q, block_k, warps, stages = best[1]
    facts = {"tiles": f"{block_q}x{block_k}, {warps} warps, {stages} stages", "tiles tried": len(choices)}
    return Ready(best[2].run, facts=facts)


def load(name: str, path: Path) -> ModuleType:
    """The module in that file, with stand-ins for the packages that its kernel does not use."""
    with _stand_ins():
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # Triton looks for a kernel's globals there
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in UNUSED}
    sys.modules.update(dict.fromkeys(UNUSED, Unused))
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class _AnyName(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unused


class Unused(metaclass=_AnyName):
    """Whatever a file asks of a package that stands in: a class to inherit, a decorator, a constant, a "no"."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> "Unused":
        return self

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> "Unused":
        if name.startswith("__"):
            raise AttributeError(name)
        return self
