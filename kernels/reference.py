"""Attention as the textbook has it: dense scores, dense masks, derivatives by JAX itself. The oracle of the tests.

Nothing here repeats the algebra of the other backends: the tangent is `jax.jvp` of the softmax and the backward pass
its `jax.vjp`, so a slip in a hand-derived formula cannot hide in both. Memory is quadratic in length.
"""

from collections.abc import Callable

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


def _of_part(mask: KeyRuns | None, scale: float, *point: Array) -> Callable[[Query, Key, Value], Out]:
    """o as a function of q, k and v near the point (q, k, v, o, lse). The keys may be some of those that o and lse are
    of: what the others add to the softmax's sums is then a constant."""
    *x, o, lse = point
    seen = dense(mask, x[0].shape[1], x[1].shape[1])[None, None]
    level = jnp.where(jnp.isneginf(lse), 0, lse)[..., None]

    def sums(q: Query, k: Key, v: Value) -> tuple[Array, Array]:
        e = jnp.exp(jnp.where(seen, scale * jnp.einsum("bsnd,btnd->bnst", q, k), -jnp.inf) - level)
        return jnp.einsum("bnst,btnd->bsnd", e, v), jnp.swapaxes(e.sum(axis=-1, keepdims=True), 1, 2)

    above, below = sums(*x)  # o and 1 where these are all the keys

    def near(q: Query, k: Key, v: Value) -> Out:
        a, b = sums(q, k, v)
        return (a + (o - above)) / (b + (1 - below))

    return near


def tangent(
    q: Query, k: Key, v: Value, o: Out, lse: Lse, tq: Query, tk: Key, tv: Value, mask: KeyRuns | None, scale: float
) -> Out:
    """The directional derivative of o along (tq, tk, tv)."""
    tq, tk, tv = (jnp.zeros_like(x) if t is None else t for t, x in ((tq, q), (tk, k), (tv, v)))
    point = _wide(q, k, v, o, lse)
    _, to = jax.jvp(_of_part(mask, scale, *point), point[:3], _wide(tq, tk, tv))
    return to.astype(q.dtype)


def backward(
    q: Query, k: Key, v: Value, o: Out, lse: Lse, do: Out, mask: KeyRuns | None, scale: float
) -> tuple[Query, Key, Value]:
    """The gradients of <o, do> in q, k and v."""
    point = _wide(q, k, v, o, lse)
    _, pull = jax.vjp(_of_part(mask, scale, *point), *point[:3])
    dq, dk, dv = pull(*_wide(do))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
