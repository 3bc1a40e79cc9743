"""How far results are from float64: every head, every row.

The exact results are the textbook's softmax with derivatives by JAX, in float64, a head and some rows at a time; so
they fit the memory, and no algebra of ours is in them.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rcm_jax.kernels.bench_shapes import Shape
from rcm_jax.kernels.masks import in_runs, row_runs

ROWS = 512  # queries at a time
RESULTS = {"forward": ("o",), "tangent": ("to",), "forward+tangent": ("o", "to"), "backward": ("dq", "dk", "dv")}


def exact(shape: Shape, x: Mapping[str, Array]) -> dict[str, Array]:
    """o, to, dq, dk, dv in float64, [B, S, N, D] each."""
    with jax.enable_x64(True):
        samples = [
            [_head(shape, {name: x[name][b, :, n] for name in ("q", "k", "v", "tq", "tk", "tv", "do")})
             for n in range(shape.heads)]
            for b in range(shape.batch)
        ]  # fmt: skip
        return {
            name: jnp.stack([jnp.stack([head[name] for head in heads], axis=1) for heads in samples])
            for name in samples[0][0]
        }


@functools.partial(jax.jit, static_argnums=0)
def _exact_head(rows: int, scale: float, x: dict[str, Array], runs: Array | None, kv_len: Array) -> dict[str, Array]:
    x = {name: value.astype(jnp.float64) for name, value in x.items()}
    keys = jnp.arange(x["k"].shape[0])

    def chunk(sums: tuple, part: tuple) -> tuple[tuple, tuple]:
        q, tq, do, part_runs = part
        seen = (keys < kv_len)[None] if part_runs is None else in_runs(part_runs, keys) & (keys < kv_len)[None]
        o, to = jax.jvp(
            lambda q, k, v: textbook(q, k, v, seen, scale), (q, x["k"], x["v"]), (tq, x["tk"], x["tv"])
        )  # fmt: skip
        dq, dk, dv = jax.vjp(lambda q, k, v: textbook(q, k, v, seen, scale), q, x["k"], x["v"])[1](do)
        return (sums[0] + dk, sums[1] + dv), (o, to, dq)

    def cut(a: Array) -> Array:
        return jnp.pad(a, ((0, -len(a) % rows), *[(0, 0)] * (a.ndim - 1))).reshape(-1, rows, *a.shape[1:])

    parts = (cut(x["q"]), cut(x["tq"]), cut(x["do"]), None if runs is None else cut(runs))
    (dk, dv), by_row = jax.lax.scan(chunk, (jnp.zeros_like(x["k"]), jnp.zeros_like(x["v"])), parts)
    o, to, dq = (a.reshape(-1, a.shape[-1])[: x["q"].shape[0]] for a in by_row)
    return {"o": o, "to": to, "dq": dq, "dk": dk, "dv": dv}


def _head(shape: Shape, x: dict[str, Array]) -> dict[str, Array]:
    runs = row_runs(shape.mask) if shape.runs else None
    return _exact_head(min(ROWS, shape.queries), shape.scale, x, runs, jnp.int32(shape.seen_keys))


def textbook(
    q: Float[Array, "S D"], k: Float[Array, "K D"], v: Float[Array, "K D"], seen: Bool[Array, "#S K"], scale: float
) -> Float[Array, "S D"]:
    """softmax(scale q kᵀ) v over the keys that a row sees; 0 for a row that sees none."""
    s = jnp.where(seen, scale * (q @ k.T), -jnp.inf)
    top = jax.lax.stop_gradient(s.max(axis=1, keepdims=True))
    e = jnp.exp(s - jnp.where(jnp.isneginf(top), 0, top))
    total = e.sum(axis=1, keepdims=True)
    return (e / jnp.where(total == 0, 1, total)) @ v


def misses(kind: str, got: object, want: Mapping[str, Array]) -> dict[str, list[float]]:
    """For each result of a pass [relative L2 error, that of the worst row]; a row's is relative to what rows are in
    the root mean square, so that a row of almost nothing does not decide. NaN where a result has one."""
    got = jax.tree.leaves(got)
    names = RESULTS[kind]
    if len(got) != len(names):
        raise ValueError(f"{kind} must give {names}, not {len(got)} arrays")
    with jax.enable_x64(True):
        return {name: np.asarray(_miss(g, want[name])).tolist() for name, g in zip(names, got, strict=True)}


@jax.jit
def _miss(got: Array, want: Array) -> Array:
    squares = ((got.astype(jnp.float64) - want) ** 2).sum(axis=-1)
    mean = (want**2).sum(axis=-1).mean()
    return jnp.sqrt(jnp.stack([squares.mean(), squares.max()]) / mean)
