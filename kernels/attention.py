"""The attention op: the only code of the library with differentiation rules of its own.

    attention(q, k, v)          q [B, S, N, D], k [B, K, N, D], v [B, K, N, V] -> o [B, S, N, V]

A backend computes; the rules below say how JAX may differentiate, and no backend is ever looked into:

    forward (q, k, v, mask, scale)                         -> o, lse      lse [B, N, S] = log Σ exp(scale q·k)
    tangent (q, k, v, o, lse, tq, tk, tv, mask, scale)     -> to          linear in tq, tk, tv; None is a zero
    backward(q, k, v, o, lse, do, mask, scale)             -> dq, dk, dv  the transpose of tangent
    fused   (q, k, v, tq, tk, tv, mask, scale)             -> o, lse, to  if it has a kernel for both at once

Forward mode calls `forward` and `tangent`; reverse mode transposes the tangent into `backward`; the gradient of a loss
that contains a jvp under stop_gradient (rCM's consistency loss) does both in one pass. Derivatives of derivatives are
not defined and come out as NaN. o and lse carry the names "attention_o" and "attention_lse" for remat policies: one
that saves them keeps the backward pass from running the forward kernel again.
"""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from rcm_jax.kernels import masks
from rcm_jax.kernels.masks import KeyRuns

# --- backends -------------------------------------------------------------------------------------------------------

BACKENDS = {
    "reference": "rcm_jax.kernels.reference",
    "xla": "rcm_jax.kernels.xla",
    "pallas_triton": "rcm_jax.kernels.pallas_triton",
}
FAST = ("pallas_triton",)  # each has serves(q, v): whether it runs here, for such operands


@dataclasses.dataclass(frozen=True)
class Backend:
    """Three functions on arrays, signatures above; each raises NotImplementedError, with the reason, if it can't serve.

    `forward` is called before the other two, with the same shapes and dtypes: a check there is enough.
    """

    forward: Callable[..., tuple[Array, Array]]
    tangent: Callable[..., Array]
    backward: Callable[..., tuple[Array, Array, Array]]
    fused: Callable[..., tuple[Array, Array, Array]] | None = None

    def __post_init__(self) -> None:
        if self.fused is None:
            object.__setattr__(self, "fused", functools.partial(_one_after_the_other, self.forward, self.tangent))


def _one_after_the_other(
    forward: Callable, tangent: Callable, q: Array, k: Array, v: Array, tq: Array, tk: Array, tv: Array,
    mask: KeyRuns | None, scale: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """`fused` for a backend that has none."""
    o, lse = forward(q, k, v, mask, scale)
    return o, lse, tangent(q, k, v, o, lse, tq, tk, tv, mask, scale)


@functools.cache
def load_backend(name: str) -> Backend:
    """The backend of that name; its module is imported only now."""
    if name not in BACKENDS:
        raise ValueError(f"implementation={name!r} is not one of {['auto', *BACKENDS]}")
    module = importlib.import_module(BACKENDS[name])
    return Backend(module.forward, module.tangent, module.backward, getattr(module, "fused", None))


def select_backend(q: Array, k: Array, v: Array, mask: KeyRuns | None) -> str:
    """What implementation="auto" means for these operands: the first fast backend that serves them here, or xla."""
    del k, mask
    for name in FAST:
        with contextlib.suppress(ImportError):  # a jax that has dropped the backend's route
            if importlib.import_module(BACKENDS[name]).serves(q, v):
                return name
    return "xla"


# --- the op ---------------------------------------------------------------------------------------------------------


def attention(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    *,
    mask: KeyRuns | None = None,
    scale: float | None = None,
    implementation: str | Backend = "auto",
    fused: bool = False,
) -> Float[Array, "B S N V"]:
    """softmax(scale q kᵀ) v over the keys that the mask lets a query see.

    Softmax and sums are float32 for narrower inputs (float64 for float64); the result has the dtype of the inputs.
    A query that sees no key gives 0. `scale` is a Python number, by default D**-0.5. `implementation` is "auto", the
    name of a backend or a Backend. vmap folds into B; over kv_len, derivatives run one sample after the other.

    `fused` is for a function that is only ever called under `jax.jvp`: value and tangent then come from one kernel,
    and the gradient may flow through the value (rCM's consistency loss: one pass). A plain `jax.grad` raises.

    Raises ValueError or TypeError for operands that do not fit, NotImplementedError from a backend that can't serve.
    """
    _check_operands(q, k, v)
    masks.check(mask, q.shape[1], k.shape[1])
    if mask is not None and mask.kv_len is not None:
        mask = dataclasses.replace(mask, kv_len=jnp.asarray(mask.kv_len, jnp.int32))
    if not isinstance(implementation, Backend):
        name = select_backend(q, k, v, mask) if implementation == "auto" else implementation
        implementation = load_backend(name)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if fused:
        return _value_of_fused(implementation, scale, q, k, v, mask)
    # The forward kernel runs outside the rule, on values without tangents: remat policies see the names only here (they
    # do not look into a custom_jvp), and however often the op is differentiated there is one o and one lse to keep.
    o, lse = _call(_forward_p, implementation, scale, jax.lax.stop_gradient((q, k, v)), mask)
    o, lse = checkpoint_name(o, "attention_o"), checkpoint_name(lse, "attention_lse")
    return _with_tangent(implementation, scale, q, k, v, o, lse, mask)


def _check_operands(q: Array, k: Array, v: Array) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention takes [batch, tokens, heads, width] arrays of rank 4, not {shapes}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v must have one batch size (axis 0): {shapes}")
    if not q.shape[2] == k.shape[2] == v.shape[2]:
        raise ValueError(f"q, k and v must have the same number of heads (axis 2): {shapes}")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0:
        raise ValueError(f"k and v must have the same length (axis 1), at least 1: {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have the same head width (axis 3): {shapes}")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(f"q, k and v must have one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}; cast first")


# --- three kernels as primitives: JAX may batch them and transpose the linear one, and never looks inside -----------
#
# Operands: the arrays of the backend's function, which have B in front, then the arrays of the mask, which have not.
# Static, and therefore hashable: the backend, the scale and the mask's tree structure, which holds its runs.


def _split(operands: Sequence, tree: Any) -> tuple[Sequence, Sequence]:
    arrays = tree.children()[0].num_leaves
    return operands[:arrays], operands[arrays:]


def _kernel(kind: str, shapes: Callable[..., list]) -> Primitive:
    """The primitive that calls the backend's function of that name; `shapes` maps its arrays' types to its results'."""
    kernel = Primitive(f"attention_{kind}")
    kernel.multiple_results = True

    def call(*operands: Array, backend: Backend, scale: float, tree: Any) -> tuple[Array, ...]:
        arrays, mask = jax.tree.unflatten(tree, operands)
        out = getattr(backend, kind)(*arrays, mask, scale)
        return out if isinstance(out, tuple) else (out,)

    kernel.def_impl(jax.jit(call, static_argnames=("backend", "scale", "tree")))
    kernel.def_abstract_eval(lambda *operands, tree, **_: shapes(*_split(operands, tree)[0]))
    mlir.register_lowering(kernel, mlir.lower_fun(call, multiple_results=True))
    batching.primitive_batchers[kernel] = functools.partial(_batch, kernel)
    return kernel


def _batch(kernel: Primitive, operands: Sequence, dims: Sequence, *, tree: Any, **static: Any) -> tuple:
    """The mapped axis becomes part of B. A mask has no batch axis: if its arrays are mapped, one sample at a time."""
    bind = functools.partial(kernel.bind, tree=tree, **static)
    mapped = [d is not None for d in dims]
    operands = [jnp.moveaxis(x, d, 0) if m else x for x, d, m in zip(operands, dims, mapped, strict=True)]
    size = next(x.shape[0] for x, m in zip(operands, mapped, strict=True) if m)
    if any(_split(mapped, tree)[1]):

        def one(sample: list) -> list:
            rest = iter(sample)
            return bind(*(next(rest) if m else x for x, m in zip(operands, mapped, strict=True)))

        out = jax.lax.map(one, [x for x, m in zip(operands, mapped, strict=True) if m])
    else:
        lead = [x if m else jnp.broadcast_to(x, (size, *x.shape)) for x, m in zip(operands, mapped, strict=True)]
        arrays, _ = _split(lead, tree)
        folded = bind(*(x.reshape(size * x.shape[1], *x.shape[2:]) for x in arrays), *_split(operands, tree)[1])
        out = [x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in folded]
    return out, [0] * len(out)


def _call(kernel: Primitive, backend: Backend, scale: float, arrays: Sequence, mask: KeyRuns | None) -> tuple:
    leaves, tree = jax.tree.flatten((tuple(arrays), mask))  # None among the arrays is part of the tree: no operand
    return tuple(kernel.bind(*leaves, backend=backend, scale=scale, tree=tree))


def _forward_shapes(q: ShapedArray, k: ShapedArray, v: ShapedArray) -> list:
    del k
    wide = jnp.promote_types(q.dtype, jnp.float32)
    o = ShapedArray((*q.shape[:-1], v.shape[-1]), q.dtype)
    return [o, ShapedArray((q.shape[0], q.shape[2], q.shape[1]), wide)]


_forward_p = _kernel("forward", _forward_shapes)
_tangent_p = _kernel("tangent", lambda q, k, v, o, *_: [ShapedArray(o.shape, o.dtype)])
_backward_p = _kernel("backward", lambda *arrays: [ShapedArray(x.shape, x.dtype) for x in arrays[:3]])


def _fused_shapes(q: ShapedArray, k: ShapedArray, v: ShapedArray, *_: ShapedArray) -> list:
    o, lse = _forward_shapes(q, k, v)
    return [o, lse, o]


_fused_p = _kernel("fused", _fused_shapes)


# A linear map that gives NaN, and whose transpose gives NaN for what is not exactly 0: under stop_gradient some
# transformations pass zeros back, and these must stay zeros.
_second_derivative_p = Primitive("attention_second_derivative")
_second_derivative_p.def_impl(lambda x: jnp.full_like(x, jnp.nan))
_second_derivative_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_second_derivative_p, mlir.lower_fun(_second_derivative_p.impl, multiple_results=False))
ad.deflinear2(_second_derivative_p, lambda ct, _: [jnp.where(ct == 0, 0, jnp.nan).astype(ct.dtype)])
batching.defvectorized(_second_derivative_p)


def _first_order(kernel: Primitive) -> Callable:
    """The kernel as a function whose derivative is NaN, forward and reverse: a second derivative is not computed.

    stop_gradient on the result keeps the NaN out of everything else; without one it is loud.
    """

    def op(backend: Backend, scale: float, arrays: tuple, mask: KeyRuns | None) -> tuple:
        return _call(kernel, backend, scale, arrays, mask)

    op.__name__ = kernel.name
    op = jax.custom_jvp(op, nondiff_argnums=(0, 1))

    @op.defjvp
    def cut(backend: Backend, scale: float, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
        out = op(backend, scale, *primals)
        moving = [t for t in tangents[0] if t is not None]
        total = sum(t.astype(out[0].dtype).sum() for t in moving)  # so that each of them is reached in reverse
        return out, tuple(_second_derivative_p.bind(jnp.broadcast_to(total, x.shape).astype(x.dtype)) for x in out)

    return op


_tangent, _backward = _first_order(_tangent_p), _first_order(_backward_p)


def _transpose(cotangents: Sequence, *operands: Any, backend: Backend, scale: float, tree: Any) -> list:
    arrays, leaves = _split(operands, tree)
    residuals, tangents = arrays[:5], arrays[5:]
    present = [t.num_leaves > 0 for t in tree.children()[0].children()[5:]]  # the others are None: no operand
    (do,) = cotangents
    if type(do) is ad.Zero:
        grads = [ad.Zero(t.aval) if ad.is_undefined_primal(t) else None for t in tangents]
    else:
        mask = jax.tree.unflatten(tree.children()[1], leaves)
        grads = _backward(backend, scale, (*residuals, do), mask)
        grads = [g for g, p in zip(grads, present, strict=True) if p]
    wanted = [g if ad.is_undefined_primal(t) else None for g, t in zip(grads, tangents, strict=True)]
    return [None] * len(residuals) + wanted + [None] * len(leaves)


ad.primitive_transposes[_tangent_p] = _transpose

# --- the rule -------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_tangent(
    backend: Backend, scale: float, q: Array, k: Array, v: Array, o: Array, lse: Array, mask: KeyRuns | None
) -> Array:
    """o, which is attention's result already, with the derivative of attention in q, k and v."""
    del backend, scale, q, k, v, lse, mask
    return o


@functools.partial(_with_tangent.defjvp, symbolic_zeros=True)
def _with_tangent_jvp(backend: Backend, scale: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    *residuals, mask = primals
    tangents = [None if isinstance(t, SymbolicZero) else t for t in tangents[:3]]
    o = _with_tangent(backend, scale, *primals)  # itself again: the primal of a jvp still has a gradient
    if all(t is None for t in tangents):
        return o, jnp.zeros_like(o)
    (to,) = _tangent(backend, scale, (*residuals, *tangents), mask)
    return o, to


# --- the rule of `fused`: one kernel for value and tangent, whose gradient is the value's ----------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _value_of_fused(backend: Backend, scale: float, q: Array, k: Array, v: Array, mask: KeyRuns | None) -> Array:
    return _call(_forward_p, backend, scale, (q, k, v), mask)[0]


@functools.partial(_value_of_fused.defjvp, symbolic_zeros=True)
def _value_of_fused_jvp(backend: Backend, scale: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    tangents = tuple(None if isinstance(t, SymbolicZero) else t for t in tangents[:3])
    if all(t is None for t in tangents):
        o = attention(*primals[:3], mask=primals[3], scale=scale, implementation=backend)
        return o, jnp.zeros_like(o)
    return _value_and_tangent(backend, scale, primals[:3], tangents, primals[3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _value_and_tangent(
    backend: Backend, scale: float, arrays: tuple, tangents: tuple, mask: KeyRuns | None
) -> tuple[Array, Array]:
    o, _, to = _call(_fused_p, backend, scale, (*arrays, *tangents), mask)
    return o, to


def _value_and_tangent_fwd(backend: Backend, scale: float, arrays: tuple, tangents: tuple, mask: KeyRuns | None):
    o, lse, to = _call(_fused_p, backend, scale, (*arrays, *tangents), mask)
    o, lse = checkpoint_name(o, "attention_o"), checkpoint_name(lse, "attention_lse")
    return (o, to), (arrays, o, lse, tangents, mask)


def _value_and_tangent_bwd(backend: Backend, scale: float, residuals: tuple, cotangents: tuple) -> tuple:
    arrays, o, lse, tangents, mask = residuals
    do, dto = cotangents
    grads = _backward(backend, scale, (*arrays, o, lse, do), mask)
    # The tangent has no gradient: a cotangent of it that is not 0 makes NaN of all, as everywhere in this file.
    poison = jnp.where((dto == 0).all(), 0, jnp.nan)
    grads = tuple(g + poison.astype(g.dtype) for g in grads)
    t_grads = tuple(None if t is None else jnp.full_like(t, poison) for t in tangents)
    return grads, t_grads, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask)


_value_and_tangent.defvjp(_value_and_tangent_fwd, _value_and_tangent_bwd)
