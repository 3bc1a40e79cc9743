"""Attention as the textbook has it: dense scores, dense masks, derivatives by JAX itself. The oracle of the tests.

Nothing here repeats the algebra of the other backends: the tangent is `jax.jvp` of the softmax and the backward pass
its `jax.vjp`, so a slip in a hand-derived formula cannot hide in both. Memory is quadratic in length.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.kernels.masks import KeyRuns, dense

Query = Float[Array, "B S N D"]
Key = Float[Array, "B K N D"]
Value = Float[Array, "B K N V"]
Out = Float[Array, "B S N V"]
Lse = Float[Array, "B N S"]


def _attend(q: Query, k: Key, v: Value, mask: KeyRuns | None, scale: float) -> tuple[Out, Lse]:
    seen = dense(mask, q.shape[1], k.shape[1])[None, None]
    s = jnp.where(seen, scale * jnp.einsum("bsnd,btnd->bnst", q, k), -jnp.inf)
    top = jax.lax.stop_gradient(s.max(axis=-1, keepdims=True))
    e = jnp.exp(s - jnp.where(jnp.isneginf(top), 0, top))
    total = e.sum(axis=-1, keepdims=True)
    o = jnp.einsum("bnst,btnd->bsnd", e / jnp.where(total == 0, 1, total), v)  # a row that sees no key: 0
    return o, (jnp.log(total) + top)[..., 0]


def _wide(*arrays: Array) -> tuple[Array, ...]:
    return tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays)


def forward(q: Query, k: Key, v: Value, mask: KeyRuns | None, scale: float) -> tuple[Out, Lse]:
    """o = softmax(scale q kᵀ) v in the dtype of q, and the log of the softmax's denominator, at least float32."""
    o, lse = _attend(*_wide(q, k, v), mask, scale)
    return o.astype(q.dtype), lse


def tangent(
    q: Query, k: Key, v: Value, o: Out, lse: Lse, tq: Query, tk: Key, tv: Value, mask: KeyRuns | None, scale: float
) -> Out:
    """The directional derivative of o along (tq, tk, tv); o and lse are not needed here."""
    del o, lse
    tq, tk, tv = (jnp.zeros_like(x) if t is None else t for x, t in ((q, tq), (k, tk), (v, tv)))
    _, to = jax.jvp(lambda *x: _attend(*x, mask, scale)[0], _wide(q, k, v), _wide(tq, tk, tv))
    return to.astype(q.dtype)


def backward(
    q: Query, k: Key, v: Value, o: Out, lse: Lse, do: Out, mask: KeyRuns | None, scale: float
) -> tuple[Query, Key, Value]:
    """The gradients of <o, do> in q, k and v; o and lse are not needed here."""
    del o, lse
    _, pull = jax.vjp(lambda *x: _attend(*x, mask, scale)[0], *_wide(q, k, v))
    dq, dk, dv = pull(*_wide(do))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
