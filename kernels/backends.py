"""The backends of attention: these compute, and attention.py says how JAX may differentiate.

A backend is three functions on arrays, and three more that are optional:

    forward (q, k, v, mask, scale)                         -> o, lse      lse [B, N, S] = log Σ exp(scale q·k)
    tangent (q, k, v, o, lse, tq, tk, tv, mask, scale)     -> to          linear in tq, tk, tv; None is a zero
    backward(q, k, v, o, lse, do, mask, scale)             -> dq, dk, dv  the transpose of tangent
    fused   (q, k, v, tq, tk, tv, mask, scale)             -> o, lse, to  if it has a kernel for both at once
    forward_of_layer(q, k, v, layer, mask, scale)          -> o, lse      k, v [L, B, K, N, D]: if it need not copy one
    forward_of_past(q, past, mask, scale)                  -> o, lse      a `Past`: if it reads what is stored

k and v of the second and third may be some of the keys that o and lse are of: their share is asked for then.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
from jaxtyping import Array

from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.past import Past

BACKENDS = {
    "reference": "rcm_jax.kernels.reference",
    "xla": "rcm_jax.kernels.xla",
    "pallas_triton": "rcm_jax.kernels.pallas_triton",
}
OPTIONAL = ("fused", "forward_of_layer", "forward_of_past")


@dataclasses.dataclass(frozen=True)
class Backend:
    """Functions on arrays, signatures above; each raises NotImplementedError, with the reason, if it can't serve.

    `forward` or `fused` is called before the other two, with the same shapes and dtypes: a check there is enough.
    """

    forward: Callable[..., tuple[Array, Array]]
    tangent: Callable[..., Array]
    backward: Callable[..., tuple[Array, Array, Array]]
    fused: Callable[..., tuple[Array, Array, Array]] | None = None
    forward_of_layer: Callable[..., tuple[Array, Array]] | None = None
    forward_of_past: Callable[..., tuple[Array, Array]] | None = None

    def __post_init__(self) -> None:
        if self.fused is None:
            object.__setattr__(self, "fused", functools.partial(_one_after_the_other, self.forward, self.tangent))
        if self.forward_of_layer is None:
            object.__setattr__(self, "forward_of_layer", functools.partial(_of_a_copy, self.forward))
        if self.forward_of_past is None:
            object.__setattr__(self, "forward_of_past", functools.partial(_of_what_is_made, self.forward))


def _of_a_copy(
    forward: Callable, q: Array, k: Array, v: Array, layer: Array, mask: KeyRuns | None, scale: float
) -> tuple[Array, Array]:
    """`forward_of_layer` for a backend that has none."""
    k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v))
    return forward(q, k, v, mask, scale)


def _of_what_is_made(
    forward: Callable, q: Array, past: Past, mask: KeyRuns | None, scale: float
) -> tuple[Array, Array]:  # fmt: skip
    """`forward_of_past` for a backend that has none."""
    return forward(q, *past.one(q.dtype), mask, scale)


def _one_after_the_other(
    forward: Callable, tangent: Callable, q: Array, k: Array, v: Array, tq: Array, tk: Array, tv: Array,
    mask: KeyRuns | None, scale: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """`fused` for a backend that has none."""
    o, lse = forward(q, k, v, mask, scale)
    return o, lse, tangent(q, k, v, o, lse, tq, tk, tv, mask, scale)


@functools.cache
def load_backend(name: str) -> Backend:
    """The backend of that name, all passes from one module, which is imported only now."""
    if name not in BACKENDS:
        raise ValueError(f"implementation={name!r} is not one of {['auto', *BACKENDS]}")
    module = importlib.import_module(BACKENDS[name])
    more = {name: getattr(module, name, None) for name in OPTIONAL}
    return Backend(module.forward, module.tangent, module.backward, **more)
