"""Attention in plain JAX, block by block over the keys: memory linear in length, on any device.

With P = exp(S - lse), S = scale q kᵀ and lse known from the forward pass (docs/kernels.md):

    o  = P v
    to = P tv + (P∘tS) v - rowsum(P∘tS)∘o,           tS = scale (tq kᵀ + q tkᵀ)
    dS = scale P∘(do vᵀ - rowsum(do∘o)),             dq = dS k,   dk = dSᵀ q,   dv = Pᵀ do

`backward` is the transpose of `tangent`: <do, to> = <dq, tq> + <dk, tk> + <dv, tv>. Only the forward pass rescales as
it goes; the others add up blocks. Keys that fit one block are not looped over at all, which is what short sequences on
a CPU want. Matrix products take their operands in the input dtype and accumulate in float32 (float64 for float64).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from rcm_jax.kernels.masks import KeyRuns, in_runs, row_runs

BLOCK = 512  # keys at a time; also the longest sequence that is not looped over

Query = Float[Array, "B S N D"]
Key = Float[Array, "B K N D"]
Value = Float[Array, "B K N V"]
Out = Float[Array, "B S N V"]
Lse = Float[Array, "B N S"]
Seen = Bool[Array, "1 1 S K"] | None  # None: all of them


def forward(q: Query, k: Key, v: Value, mask: KeyRuns | None, scale: float, *, block: int = BLOCK) -> tuple[Out, Lse]:
    """o in the dtype of q, and lse = log Σ exp S, at least float32. A row without keys: o = 0, lse = -inf."""
    q, k, v = _heads_first(q, k, v)

    def part(seen: Seen, k: Array, v: Array) -> tuple[Any, tuple]:
        s = _masked(scale * _dot("bnsd,bntd->bnst", q, k), seen)
        top = s.max(axis=-1, keepdims=True)
        e = jnp.exp(s - _finite(top, mask))
        return (_dot("bnst,bntd->bnsd", e, v), e.sum(axis=-1, keepdims=True), top), ()

    def join(a: tuple, b: tuple) -> tuple:
        top = jnp.maximum(a[2], b[2])
        wa, wb = (jnp.exp(x[2] - _finite(top, mask)) for x in (a, b))
        return wa * a[0] + wb * b[0], wa * a[1] + wb * b[1], top

    (acc, total, top), _ = _over_keys(part, join, _Walk.over(k.shape[2], mask, block), k, v)
    if mask is None:
        o, lse = acc / total, top + jnp.log(total)
    else:
        o, lse = acc / jnp.where(total == 0, 1, total), top + jnp.log(total)  # -inf + log 0 is the -inf we want
    return _heads_last(o, q), lse[..., 0]


def tangent(
    q: Query,
    k: Key,
    v: Value,
    o: Out,
    lse: Lse,
    tq: Query,
    tk: Key,
    tv: Value,
    mask: KeyRuns | None,
    scale: float,
    *,
    block: int = BLOCK,
) -> Out:
    """to, linear in (tq, tk, tv), of which each may be None for zero: its products are left out."""
    q, k, v, o = _heads_first(q, k, v, o)
    tq, tk, tv = (None if t is None else _heads_first(t)[0] for t in (tq, tk, tv))
    lse = _finite(lse[..., None], mask)
    given = [t for t in (tk, tv) if t is not None]

    def part(seen: Seen, k: Array, v: Array, *given: Array) -> tuple[Any, tuple]:
        blocks = iter(given)
        tk_block, tv_block = (None if t is None else next(blocks) for t in (tk, tv))
        p = jnp.exp(_masked(scale * _dot("bnsd,bntd->bnst", q, k), seen) - lse)
        to = row = jnp.zeros((), lse.dtype)
        moving = [(a, b) for a, b in ((tq, k), (q, tk_block)) if a is not None and b is not None]
        if moving:
            pts = p * (scale * sum(_dot("bnsd,bntd->bnst", a, b) for a, b in moving))
            to, row = _dot("bnst,bntd->bnsd", pts, v), pts.sum(axis=-1, keepdims=True)
        if tv_block is not None:
            to = to + _dot("bnst,bntd->bnsd", p, tv_block)
        return (to, row), ()

    (to, row), _ = _over_keys(part, _add, _Walk.over(k.shape[2], mask, block), k, v, *given)
    return _heads_last(to - row * o, q)


def backward(
    q: Query, k: Key, v: Value, o: Out, lse: Lse, do: Out, mask: KeyRuns | None, scale: float, *, block: int = BLOCK
) -> tuple[Query, Key, Value]:
    """dq, dk, dv: the transpose of `tangent`."""
    q, k, v, o, do = _heads_first(q, k, v, o, do)
    lse = _finite(lse[..., None], mask)
    wide = lse.dtype
    delta = (do.astype(wide) * o.astype(wide)).sum(axis=-1, keepdims=True)

    def part(seen: Seen, k: Array, v: Array) -> tuple[Any, tuple]:
        p = jnp.exp(_masked(scale * _dot("bnsd,bntd->bnst", q, k), seen) - lse)
        ds = scale * p * (_dot("bnsd,bntd->bnst", do, v) - delta)
        dk, dv = _dot("bnst,bnsd->bntd", ds, q), _dot("bnst,bnsd->bntd", p, do)
        return _dot("bnst,bntd->bnsd", ds, k), (dk.astype(q.dtype), dv.astype(q.dtype))

    dq, (dk, dv) = _over_keys(part, _add, _Walk.over(k.shape[2], mask, block), k, v)
    return _heads_last(dq, q), _heads_last(dk, q), _heads_last(dv, q)


# --- the walk over the keys -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Walk:
    """How the keys are cut into blocks, and which keys of a block a query sees."""

    keys: int
    block: int
    limit: Int32[Array, ""] | None  # keys from here on are not seen: kv_len, or the padding of the last block
    rows: Int32[Array, "S R 2"] | None

    @classmethod
    def over(cls, keys: int, mask: KeyRuns | None, block: int) -> "_Walk":
        block = min(block, keys)
        limit = jnp.int32(keys) if keys % block else None
        if mask is not None and mask.kv_len is not None:
            limit = jnp.minimum(mask.kv_len, keys).astype(jnp.int32)
        rows = None if mask is None or not mask.query_ends else row_runs(mask)
        return cls(keys, block, limit, rows)

    @property
    def most(self) -> int:
        return -(-self.keys // self.block)

    @property
    def blocks(self) -> Int32[Array, ""] | int:
        """Blocks to visit; with kv_len a traced number, so that a cache costs what it holds."""
        return self.most if self.limit is None else -(-self.limit // self.block)

    def seen(self, start: Int32[Array, ""] | int) -> Seen:
        keys = start + jnp.arange(self.block, dtype=jnp.int32)
        near = None if self.limit is None else (keys < self.limit)[None, :]
        runs = None if self.rows is None else in_runs(self.rows, keys)
        seen = near if runs is None else runs if near is None else near & runs
        return None if seen is None else seen[None, None]


def _over_keys(part: Callable, join: Callable, walk: _Walk, *arrays: Array) -> tuple[Any, tuple[Array, ...]]:
    """Joins part(seen, *blocks) -> (summed, by_key) over the blocks of the arrays' keys, axis 2.

    `summed` is a pytree put together with `join`; `by_key` are arrays [B, N, block, ·], laid side by side. The first
    block starts the accumulators, so nothing needs a neutral element, and a single block needs nothing else.
    """
    if walk.most == 1:
        return part(walk.seen(0), *arrays)
    padding = walk.most * walk.block - walk.keys
    arrays = tuple(jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in arrays)

    def at(i: Int32[Array, ""] | int) -> tuple[Any, tuple]:
        start = i * walk.block
        return part(walk.seen(start), *(jax.lax.dynamic_slice_in_dim(x, start, walk.block, 2) for x in arrays))

    def write(out: tuple[Array, ...], by_key: tuple[Array, ...], i: Int32[Array, ""] | int) -> tuple[Array, ...]:
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, i * walk.block, 2) for x, y in zip(out, by_key, strict=True)
        )

    def step(i: Int32[Array, ""], carry: tuple) -> tuple:
        summed, by_key = at(i)
        return join(carry[0], summed), write(carry[1], by_key, i)

    summed, by_key = at(0)
    whole = tuple(jnp.zeros((*y.shape[:2], walk.most * walk.block, y.shape[3]), y.dtype) for y in by_key)
    init = (summed, write(whole, by_key, 0))
    summed, whole = jax.lax.fori_loop(jnp.int32(1), jnp.asarray(walk.blocks, jnp.int32), step, init)
    return summed, tuple(x[:, :, : walk.keys] for x in whole)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


# --- small parts ----------------------------------------------------------------------------------------------------


def _heads_first(*arrays: Array) -> tuple[Array, ...]:
    """[B, S, N, D] -> [B, N, S, D]: the batched matrix products then need no further transposition."""
    return tuple(jnp.swapaxes(x, 1, 2) for x in arrays)


def _heads_last(x: Array, like: Array) -> Array:
    return jnp.swapaxes(x, 1, 2).astype(like.dtype)


def _dot(spec: str, a: Array, b: Array) -> Array:
    """Operands in the dtype of b, which is an input; the sum in float32 or float64."""
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=jnp.promote_types(b.dtype, jnp.float32))


def _masked(s: Float[Array, "B N S K"], seen: Seen) -> Float[Array, "B N S K"]:
    return s if seen is None else jnp.where(seen, s, -jnp.inf)


def _finite(x: Array, mask: KeyRuns | None) -> Array:
    """0 for the -inf of a row that sees no key, so that exp(-inf - x) is 0 and not NaN. Without a mask: x."""
    return x if mask is None else jnp.where(jnp.isneginf(x), 0, x)
