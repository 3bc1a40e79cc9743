"""Pieces of the Pallas kernels' bodies: the running softmax, a tangent's sums, and how results are stored."""

import functools

import jax.numpy as jnp
from jaxtyping import Array

from rcm_jax.kernels.pallas_walk import LOG2_E, Arithmetic, Operand, Refs, Walk, store


def online(m: Array, s: Array, arith: Arithmetic, guard: bool) -> tuple[Array, Array, Array]:
    """(new maximum, exp2(s - maximum), by what earlier sums shrink).

    guard: a row may have seen nothing yet, with this tile. It is -inf all along, and wants zeros.
    """
    new = jnp.maximum(m, s.max(axis=1))
    shift = arith.factor * (jnp.where(new == -jnp.inf, 0, new) if guard else new)
    return new, arith.exp2(s, shift[:, None]), arith.exp2(m, shift)


def add_tangent(
    row: Array, acc: Array, p: Array, q: Array, k: Array, v: Array, tq: Array | None, tk: Array | None,
    tv: Array | None, arith: Arithmetic,
) -> tuple[Array, Array]:  # fmt: skip
    """row + rowsum(P∘tS) and acc + (P∘tS) V + P tV of one tile, for unnormalised or normalised P.

    Products are added to `acc` one by one: a sum of two that is added later would be a second accumulator.
    """
    moving = [(a, b) for a, b in ((tq, k), (q, tk)) if a is not None and b is not None]
    if moving:
        pts = p * (arith.scale * functools.reduce(jnp.add, (arith.dot_t(a, b) for a, b in moving)))
        row, acc = row + pts.sum(axis=1), acc + arith.dot(pts.astype(v.dtype), v)
    if tv is not None:
        acc = acc + arith.dot(p.astype(tv.dtype), tv)
    return row, acc


def base_2(lse: Array, walk: Walk) -> Array:
    """lse in base 2, and 0 where it is -inf: exp2(-inf - 0) is the 0 that a row without keys wants."""
    return jnp.where(lse == -jnp.inf, 0, lse * LOG2_E) if walk.blind else lse * LOG2_E


def store_forward(outs: Refs, walk: Walk, m: Array, total: Array, acc: Array, arith: Arithmetic) -> Array:
    """Stores o and lse of the rows, and returns o in float32."""
    o = acc / jnp.where(total == 0, 1, total)[:, None]
    store(outs["o"], walk.stay, o)
    # -inf + log2(0): -inf for a row without keys
    store(outs["lse"], walk.stay, (arith.factor * m + jnp.log2(total)) / LOG2_E)
    return o


def constant(walk: Walk, value: float, like: Operand | None = None) -> Array:
    """A float32 accumulator: one number a row of the tile, or as wide as `like`."""
    shape = (walk.stay.size,) if like is None else (walk.stay.size, like.ref.shape[-1])
    return jnp.full(shape, value, jnp.float32)
