"""Attention, the one op of the library with differentiation rules of its own.

    attention(q, k, v)          q [B, S, N, D], k [B, K, N, D], v [B, K, N, V] -> o [B, S, N, V]

A backend computes (`backends.py`; which one for which pass: `choice.py`); the rules below say how JAX may
differentiate, and no backend is ever looked into. Forward mode calls `forward` and `tangent`; reverse mode transposes
the tangent into `backward`; the gradient of a loss that contains a jvp under stop_gradient (rCM's consistency loss)
does both in one pass. Derivatives of derivatives are not defined and come out as NaN.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from rcm_jax.kernels import masks, primitives
from rcm_jax.kernels.backends import BACKENDS, Backend, load_backend
from rcm_jax.kernels.choice import Call, choose, not_read
from rcm_jax.kernels.joining import join
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.past import Past

__all__ = ["BACKENDS", "Backend", "Past", "attention"]


def attention(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    *,
    mask: KeyRuns | None = None,
    scale: float | None = None,
    implementation: str | Backend = "auto",
    fused: bool = False,
    past: Past | None = None,
    name: str = "attention",
) -> Float[Array, "B S N V"]:
    """softmax(scale q kᵀ) v over the keys that the mask lets a query see.

    Softmax and sums are float32 for narrower inputs (float64 for float64); the result has the dtype of the inputs.
    A query that sees no key gives 0. `scale` is a Python number, by default D**-0.5. `implementation` is "auto", each
    pass by what serves it best (`choice.py`), or the name of a backend or a Backend, which all passes then come from.
    vmap folds into B; over kv_len, derivatives run one sample after the other.

    `fused` is for a function that is only ever called under `jax.jvp`: value and tangent then come from one kernel,
    and the gradient flows through the value as without (rCM's consistency loss: one pass). A plain `jax.grad` raises.

    With a `past` the softmax is over its keys and k together, and `mask` is between q and k. The derivative is taken by
    parts: keys that stand still while the others move cost a tangent three products a pair, not five. So does one
    kernel for value and tangent cost more, and `fused` is of no effect. A past that is `apart` is not copied, and one
    that is stored before RoPE or in few bytes is read so by a kernel that can (`choice.not_read` says which cannot).

    o and lse carry the names `name`_o and `name`_lse: a remat policy that saves them keeps the backward pass from
    running the forward kernel again.

    Raises ValueError or TypeError for operands that do not fit, NotImplementedError from a backend that can't serve.
    """
    if past is not None and past.as_stored and not_read(past, q):
        past = past.made(q.dtype)
    parts = [(k, v, mask)] if past is None else [(*past.one(q.dtype), past.mask), (k, v, mask)]
    parts = [((k, v), _checked(q, k, v, mask)) for k, v, mask in parts]
    keys, key_masks = zip(*parts, strict=True)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    # The forward kernel runs outside the rule, on values without tangents: remat policies see the names only here (they
    # do not look into a custom_jvp), and however often the op is differentiated there is one o and one lse to keep.
    if past is not None and past.apart:
        backend = _backend(implementation, Call.of(q, k, v, mask, past.layer is not None))
        o, lse = _forward_apart(backend, scale, q, keys, key_masks, past)
    else:
        whole = keys[0] if past is None else tuple(jnp.concatenate(x, axis=1) for x in zip(*keys, strict=True))
        mask = masks.joined(key_masks, [k.shape[1] for k, _ in keys], q.shape[1])
        backend = _backend(implementation, Call.of(q, *whole, mask))
        if fused and past is None:
            return _value_of_fused(backend, scale, name, q, k, v, mask)
        o, lse = primitives.forward(backend, scale, jax.lax.stop_gradient((q, *whole)), mask)
    o, lse = _named(name, o, lse)
    return _with_tangent(backend, scale, q, keys, o, lse, key_masks)


def _backend(implementation: str | Backend, call: Call) -> Backend:
    if isinstance(implementation, Backend):
        return implementation
    return choose(call) if implementation == "auto" else load_backend(implementation)


def _forward_apart(
    backend: Backend, scale: float, q: Array, keys: Sequence, key_masks: Sequence, past: Past
) -> tuple[Array, Array]:
    """o and lse over both parts, each by itself: neither is copied."""
    (pk, pv), own = keys
    if past.as_stored:
        stored = jax.lax.stop_gradient((q, past._replace(mask=None)))
        first = primitives.forward_of_past(backend, scale, stored, key_masks[0])
    elif past.layer is None:
        first = primitives.forward(backend, scale, jax.lax.stop_gradient((q, pk, pv)), key_masks[0])
    else:
        stack = jax.lax.stop_gradient((q, past.k, past.v))
        first = primitives.forward_of_layer(backend, scale, (*stack, past.layer), key_masks[0])
    parts = first, primitives.forward(backend, scale, jax.lax.stop_gradient((q, *own)), key_masks[1])
    o, lse = join(*map(jnp.stack, zip(*parts, strict=True)))
    return o.astype(q.dtype), lse


def _named(name: str, o: Array, lse: Array) -> tuple[Array, Array]:
    return checkpoint_name(o, f"{name}_o"), checkpoint_name(lse, f"{name}_lse")


def _checked(q: Array, k: Array, v: Array, mask: KeyRuns | None) -> KeyRuns | None:
    """The mask, once all fits."""
    _check_operands(q, k, v)
    masks.check(mask, q.shape[1], k.shape[1])
    if mask is None or mask.kv_len is None:
        return mask
    return dataclasses.replace(mask, kv_len=jnp.asarray(mask.kv_len, jnp.int32))


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


# --- the rule -------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_tangent(
    backend: Backend, scale: float, q: Array, keys: tuple, o: Array, lse: Array, key_masks: tuple
) -> Array:
    """o, which is attention's result already, with the derivative of attention in q and in all keys, (k, v) a part."""
    del backend, scale, q, keys, lse, key_masks
    return o


@functools.partial(_with_tangent.defjvp, symbolic_zeros=True)
def _with_tangent_jvp(backend: Backend, scale: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Given o and lse of all keys, what each part of them adds to the tangent is the tangent of that part alone."""
    q, keys, *result, key_masks = primals
    o, to = _with_tangent(backend, scale, *primals), None  # itself again: the primal of a jvp still has a gradient
    for part, moving, mask in zip(keys, tangents[1], key_masks, strict=True):
        given = [None if isinstance(t, SymbolicZero) else t for t in (tangents[0], *moving)]
        if any(t is not None for t in given):
            (more,) = primitives.tangent(backend, scale, (q, *part, *result, *given), mask)
            to = more if to is None else to + more
    return o, jnp.zeros_like(o) if to is None else to


# --- the rule of `fused`: one kernel for value and tangent, and the value's gradient by the rule above ----------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _value_of_fused(
    backend: Backend, scale: float, name: str, q: Array, k: Array, v: Array, mask: KeyRuns | None
) -> Array:
    return attention(q, k, v, mask=mask, scale=scale, implementation=backend, name=name)


@functools.partial(_value_of_fused.defjvp, symbolic_zeros=True)
def _value_of_fused_jvp(
    backend: Backend, scale: float, name: str, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
    *arrays, mask = primals
    tangents = tuple(None if isinstance(t, SymbolicZero) else t for t in tangents[:3])
    if all(t is None for t in tangents):
        o = attention(*arrays, mask=mask, scale=scale, implementation=backend, name=name)
        return o, jnp.zeros_like(o)
    o, lse, to = primitives.fused(backend, scale, (*arrays, *tangents), mask)
    # Values without gradient, outside of any rule, as in `attention`: the kernel's own derivative, which is NaN, stays
    # with the tangent, where a stop_gradient makes dead code of it. Nothing of the tangent's path is then reversed.
    o, lse = _named(name, *jax.lax.stop_gradient((o, lse)))
    q, *keys = arrays
    return _with_tangent(backend, scale, q, (tuple(keys),), o, lse, (mask,)), to
