"""What implementation="auto" means: each pass of attention gets the first backend of a table that serves it.

    print(*explain(Call.of(q, k, v, mask)), sep="\\n")       # pass, backend, and why

The device is that of the mesh which is set (`target.py`). RULES go by what backends can do and, between two that can,
by their makers' figures: none was measured with this library, and measurements replace them when there are some.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
from jaxtyping import Array

from rcm_jax.kernels import cudnn
from rcm_jax.kernels.backends import Backend, load_backend
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.past import Past
from rcm_jax.kernels.target import Target, target
from rcm_jax.quant import Stored

PASSES = ("forward", "tangent", "fused", "backward")
FLOAT8_GPU = 8.9  # whose compiler has float8
OUT_OF_REACH = range(2**31 + 1, 2**32 + 1)  # Pallas has offsets of 64 bits from 4 GiB on, and signed ones of 32 below
OLDEST_GPU = 8.0  # compute capability, of our kernels and of cuDNN's
CUDNN_WIDTHS = range(8, 129, 8)  # what its forward and its backward take on every GPU from sm_80 on
CUDNN_SHORTEST = 64  # tokens; its engines for fewer have restrictions of their own, and so short a call costs nothing


@dataclasses.dataclass(frozen=True)
class Call:
    """What a choice depends on. `here`: the device is one of this process's, so that its libraries are there too."""

    device: Target
    here: bool
    dtype: str
    widths: tuple[int, int]  # of the heads of q and k, and of v
    queries: int
    keys: int
    runs: bool = False  # the mask has runs of keys, more than a kv_len
    stack: bool = False  # some keys are one layer of a stack

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, mask: KeyRuns | None, stack: bool = False) -> "Call":
        device = target()
        runs, widths = mask is not None and bool(mask.query_ends), (q.shape[-1], v.shape[-1])
        return cls(device, _is_here(device), q.dtype.name, widths, q.shape[1], k.shape[1], runs, stack)


def _is_here(device: Target) -> bool:
    return any(d.device_kind == device.kind for d in jax.devices())


@dataclasses.dataclass(frozen=True)
class Rule:
    """`backend` for these passes, because of that, where no obstacle has a reason against it."""

    backend: str
    passes: tuple[str, ...]
    because: str
    obstacles: tuple[Callable[[Call], str | None], ...] = ()

    def against(self, call: Call) -> str | None:
        """The first reason why this backend cannot serve, or None."""
        return next((reason for obstacle in self.obstacles if (reason := obstacle(call))), None)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend of a pass, why, and (backend, why not) for those that come before it in the table."""

    kind: str
    backend: str
    because: str
    instead_of: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        others = "".join(f"; not {backend}: {reason}" for backend, reason in self.instead_of)
        return f"{self.kind}: {self.backend}, {self.because}{others}"


# --- obstacles: why not, or None -------------------------------------------------------------------------------------


def _no_such_gpu(call: Call) -> str | None:
    if call.device.is_gpu and call.device.capability >= OLDEST_GPU:
        return None
    return f"{call.device.kind} is no NVIDIA GPU of compute capability {OLDEST_GPU} or later"


def _absent(call: Call) -> str | None:
    return None if call.here else "the GPU is not here, and JAX traces cuDNN's calls only where it is"


def _no_cudnn(call: Call) -> str | None:
    del call
    return cudnn.missing()


def _runs(call: Call) -> str | None:
    return "it has no masks of runs" if call.runs else None


def _stack(call: Call) -> str | None:
    return "it would copy a layer of the stack before it reads it" if call.stack else None


def _not_for_cudnn(call: Call) -> str | None:
    (width, value_width), shortest = call.widths, min(call.queries, call.keys)
    if call.dtype != "bfloat16":
        return f"it takes bfloat16, not {call.dtype}"
    if width not in CUDNN_WIDTHS or value_width != width:
        return f"it takes heads of one width, a multiple of 8 up to {CUDNN_WIDTHS[-1]}, not {width} and {value_width}"
    return f"{shortest} tokens are fewer than {CUDNN_SHORTEST}" if shortest < CUDNN_SHORTEST else None


def _not_for_pallas(call: Call) -> str | None:
    try:
        from rcm_jax.kernels.pallas_triton import AUTO_MAX_WIDTH
    except ImportError as reason:  # a jax that has dropped the kernels' route
        return f"this jax cannot compile it: {reason}"
    widest, width = AUTO_MAX_WIDTH.get(call.dtype, 0), max(call.widths)
    if not widest:
        return f"it takes {', '.join(AUTO_MAX_WIDTH)}, not {call.dtype}"
    return f"{call.dtype} heads {width} wide would spill registers (up to {widest})" if width > widest else None


# --- the table, and what follows from it -----------------------------------------------------------------------------

RULES = (
    Rule(
        "cudnn",
        ("forward", "backward"),
        "the fastest by its makers' figures",
        (_no_such_gpu, _runs, _stack, _not_for_cudnn, _absent, _no_cudnn),
    ),
    Rule("pallas_triton", PASSES, "kernels for every pass and mask", (_no_such_gpu, _not_for_pallas)),
    Rule("xla", PASSES, "any device, dtype and width"),
)


def explain(call: Call) -> tuple[Choice, ...]:
    """The backend of each pass, and why."""
    return tuple(_choose(kind, call) for kind in PASSES)


def _choose(kind: str, call: Call) -> Choice:
    rules = [rule for rule in RULES if kind in rule.passes]
    reasons = [(rule.backend, rule.against(call)) for rule in rules]
    first = next(i for i, (_, reason) in enumerate(reasons) if reason is None)  # there is one: nothing is against xla
    return Choice(kind, rules[first].backend, rules[first].because, tuple(reasons[:first]))


def choose(call: Call) -> Backend:
    """The backend that implementation="auto" stands for."""
    return _put_together(*(choice.backend for choice in explain(call)))


@functools.cache
def _put_together(*names: str) -> Backend:
    """The backend whose passes come from those of these names."""
    if len(set(names)) == 1:
        return load_backend(names[0])
    modules = (importlib.import_module(f"rcm_jax.kernels.{name}") for name in names)
    passes = dict(zip(PASSES, modules, strict=True))
    more = {name: getattr(passes["forward"], name, None) for name in ("forward_of_layer", "forward_of_past")}
    return Backend(**{kind: getattr(module, kind, None) for kind, module in passes.items()}, **more)


def not_read(past: Past, q: Array) -> str | None:
    """Why kernels cannot read a past as it is stored, so that its layer has to be made first; None: they can."""
    if past.layer is None:
        return "it is not one layer of a stack"
    if past.v.shape[-1] != q.shape[-1]:
        return f"values are {past.v.shape[-1]} wide, and queries {q.shape[-1]}"
    reasons = ((name, _not_decoded(x)) for name, x in (("keys", past.k), ("values", past.v)))
    return next((f"{name}: {reason}" for name, reason in reasons if reason), None)


def _not_decoded(x: Array | Stored) -> str | None:
    if not isinstance(x, Stored):
        return None
    config, width = x.config, x.shape[-1]
    if not config.plain:
        return f"{config.smoothing} has to be undone"
    if config.dtype == "bf16":
        return None
    if not x.by_token:
        return f"bytes lie in the order of a {config.granularity}'s groups, not by token"
    if config.dtype == "fp8" and (target().capability or FLOAT8_GPU) < FLOAT8_GPU:
        return f"float8 is read from compute capability {FLOAT8_GPU} on"
    if x.payload.dtype.itemsize == 1 and x.payload.size in OUT_OF_REACH:
        return f"Pallas counts {x.payload.size} bytes in 32 bits, of which one is the sign"
    return None if width >= 16 and width & (width - 1) == 0 else f"heads {width} wide: a power of two from 16 is read"
