"""The functions of a backend as JAX primitives: JAX may batch them and transpose the linear one, never looks inside.

Operands: the arrays of the backend's function, which have B in front, then the arrays of the mask, which have not.
Static, and therefore hashable: the backend, the scale and the mask's tree structure, which holds its runs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from rcm_jax.kernels.backends import Backend
from rcm_jax.kernels.masks import KeyRuns


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


def _batch_of_layer(
    operands: Sequence, dims: Sequence, *, backend: Backend, scale: float, tree: Any
) -> tuple[Sequence, Sequence]:
    """Of a stack that is mapped, or a layer that is, no part of one buffer is left to read: the layer is copied."""

    def one(*operands: Array) -> tuple:
        (q, k, v, layer), mask = jax.tree.unflatten(tree, operands)
        k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v))
        return forward(backend, scale, (q, k, v), mask)

    out = jax.vmap(one, in_axes=tuple(dims))(*operands)
    return out, [0] * len(out)


def _batch_of_past(
    operands: Sequence, dims: Sequence, *, backend: Backend, scale: float, tree: Any
) -> tuple[Sequence, Sequence]:
    """Of what is mapped attention's operands are made first, as a layer is copied of a stack."""

    def one(*operands: Array) -> tuple:
        (q, past), mask = jax.tree.unflatten(tree, operands)
        return forward(backend, scale, (q, *past.one(q.dtype)), mask)

    out = jax.vmap(one, in_axes=tuple(dims))(*operands)
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
_forward_of_layer_p = _kernel(
    "forward_of_layer", lambda q, k, v, _: _forward_shapes(q, *(ShapedArray(x.shape[1:], x.dtype) for x in (k, v)))
)
_forward_of_past_p = _kernel("forward_of_past", lambda q, *_: _forward_shapes(q, q, q))  # v is as wide as q
_tangent_p = _kernel("tangent", lambda q, k, v, o, *_: [ShapedArray(o.shape, o.dtype)])
_backward_p = _kernel("backward", lambda *arrays: [ShapedArray(x.shape, x.dtype) for x in arrays[:3]])

batching.primitive_batchers[_forward_of_layer_p] = _batch_of_layer
batching.primitive_batchers[_forward_of_past_p] = _batch_of_past


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


# What the rules call, all as f(backend, scale, arrays, mask) -> results. The first three are never differentiated.
forward, forward_of_layer, forward_of_past = (
    functools.partial(_call, kernel) for kernel in (_forward_p, _forward_of_layer_p, _forward_of_past_p)
)
tangent, fused, backward = (_first_order(kernel) for kernel in (_tangent_p, _fused_p, _backward_p))


def _transpose(cotangents: Sequence, *operands: Any, backend: Backend, scale: float, tree: Any) -> list:
    arrays, leaves = _split(operands, tree)
    residuals, tangents = arrays[:5], arrays[5:]
    present = [t.num_leaves > 0 for t in tree.children()[0].children()[5:]]  # the others are None: no operand
    (do,) = cotangents
    if type(do) is ad.Zero:
        grads = [ad.Zero(t.aval) if ad.is_undefined_primal(t) else None for t in tangents]
    else:
        mask = jax.tree.unflatten(tree.children()[1], leaves)
        grads = backward(backend, scale, (*residuals, do), mask)
        grads = [g for g, p in zip(grads, present, strict=True) if p]
    wanted = [g if ad.is_undefined_primal(t) else None for g, t in zip(grads, tangents, strict=True)]
    return [None] * len(residuals) + wanted + [None] * len(leaves)


ad.primitive_transposes[_tangent_p] = _transpose
