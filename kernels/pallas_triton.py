"""Flash attention with its tangent and its transpose, as Pallas kernels on the Triton route. NVIDIA GPUs, sm_80 on.

The mathematics is that of `xla.py`, tile by tile: one program a tile of queries (of keys, for dk and dv) of one head,
which walks the tiles of the other side that the mask lets it touch. With lse known only `forward` and `fused` rescale.
docs/kernels.md derives it all.

Everything is summed in float32; matrix products take their operands in the input dtype (float32 as three TF32 products,
which keep all but its last bits). Scores are kept in base 2, as exp2 is what the hardware has. Loads outside the arrays
are masked, so no operand is ever copied to be padded; head widths that are no power of two are padded in registers. On
any device that is not CUDA the same kernels are interpreted: right, and slow.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from rcm_jax.kernels.masks import KeyRuns, row_runs, tile_segments
from rcm_jax.kernels.tiles import Tiles, tiles_for

DTYPES = ("bfloat16", "float16", "float32")
MAX_WIDTH = 256
AUTO_MAX_WIDTH = {"bfloat16": 256, "float16": 256, "float32": 64}  # float32 heads wider than this spill registers
MIN_BLOCK = 16  # the narrowest operand of a matrix product; narrower heads are padded to it
MIN_CAPABILITY = 8.0
LOG2_E = math.log2(math.e)

Query = Float[Array, "B S N D"]
Key = Float[Array, "B K N D"]
Value = Float[Array, "B K N V"]
Out = Float[Array, "B S N V"]
Lse = Float[Array, "B N S"]

# --- what the op calls ----------------------------------------------------------------------------------------------


def forward(
    q: Query, k: Key, v: Value, mask: KeyRuns | None, scale: float, *, tiles: Tiles | None = None
) -> tuple[Out, Lse]:
    """(o, lse). Raises NotImplementedError for dtypes and head widths that the kernels do not take."""
    _check_served(q, v)
    return run("forward", {"q": q, "k": k, "v": v}, mask, scale, tiles)


def tangent(
    q: Query, k: Key, v: Value, o: Out, lse: Lse, tq: Query | None, tk: Key | None, tv: Value | None,
    mask: KeyRuns | None, scale: float, *, tiles: Tiles | None = None,
) -> Out:  # fmt: skip
    """to, linear in (tq, tk, tv); each may be None for zero, and its products are left out."""
    arrays = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "tq": tq, "tk": tk, "tv": tv}
    return run("tangent", arrays, mask, scale, tiles)[0]


def fused(
    q: Query, k: Key, v: Value, tq: Query | None, tk: Key | None, tv: Value | None, mask: KeyRuns | None,
    scale: float, *, tiles: Tiles | None = None,
) -> tuple[Out, Lse, Out]:  # fmt: skip
    """(o, lse, to) from one walk over the keys: 6 matrix products, where `forward` and `tangent` take 2 + 5."""
    _check_served(q, v)
    return run("fused", {"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv}, mask, scale, tiles)


def backward(
    q: Query, k: Key, v: Value, o: Out, lse: Lse, do: Out, mask: KeyRuns | None, scale: float,
    *, tiles: Tiles | None = None,
) -> tuple[Query, Key, Value]:  # fmt: skip
    """(dq, dk, dv). dq walks the keys and (dk, dv) the queries, in two kernels: no atomics, so repeatable."""
    delta = jnp.einsum("bsnv,bsnv->bns", o, do, preferred_element_type=jnp.float32)
    arrays = {"q": q, "k": k, "v": v, "do": do, "lse": lse, "delta": delta}
    return run("dq", arrays, mask, scale, tiles) + run("dkv", arrays, mask, scale, tiles)


def _check_served(q: Query, v: Value) -> None:
    if q.dtype.name not in DTYPES:
        raise NotImplementedError(f"the Pallas kernels take {DTYPES}, not {q.dtype}; use implementation='xla'")
    for name, width in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if width > MAX_WIDTH:
            raise NotImplementedError(
                f"{name} have head width {width}; the Pallas kernels take at most {MAX_WIDTH}: use implementation='xla'"
            )


def serves(q: Query, v: Value) -> bool:
    """Whether these kernels are the ones to run here, compiled, for operands of these dtypes and widths."""
    device = jax.devices()[0]
    if device.platform != "gpu" or float(getattr(device, "compute_capability", 0)) < MIN_CAPABILITY:
        return False
    return max(q.shape[-1], v.shape[-1]) <= AUTO_MAX_WIDTH.get(q.dtype.name, 0)


# --- bodies: the queries of a tile stay, the keys are walked ---------------------------------------------------------


def _forward_body(ins: "_Refs", outs: "_Refs", walk: "_Walk", arith: "_Arithmetic") -> None:
    q = _load(ins["q"], walk.stay)

    def visit(keys: _Rows, carry: tuple, masked: bool) -> tuple:
        k, v = (_load(ins[x], keys) for x in "kv")
        m, total, acc = carry
        m, p, decay = _online(m, walk.scores(q, k, keys, arith, masked))
        return m, decay * total + p.sum(axis=1), decay[:, None] * acc + arith.dot(p.astype(v.dtype), v)

    start = _constant(walk, -jnp.inf), _constant(walk, 0), _constant(walk, 0, outs["o"])
    _store_forward(outs, walk, *walk.over(visit, start))


def _tangent_body(ins: "_Refs", outs: "_Refs", walk: "_Walk", arith: "_Arithmetic") -> None:
    q, tq, o = (_load(ins[x], walk.stay) for x in ("q", "tq", "o"))
    lse = _base_2(_load(ins["lse"], walk.stay))

    def visit(keys: _Rows, carry: tuple, masked: bool) -> tuple:
        k, v, tk, tv = (_load(ins[x], keys) for x in ("k", "v", "tk", "tv"))
        p = jnp.exp2(walk.scores(q, k, keys, arith, masked) - lse[:, None])
        row, acc = _tangent_terms(p, q, k, v, tq, tk, tv, arith)
        return carry[0] + row, carry[1] + acc

    row, acc = walk.over(visit, (_constant(walk, 0), _constant(walk, 0, outs["to"])))
    _store(outs["to"], walk.stay, acc - row[:, None] * o.astype(jnp.float32))


def _fused_body(ins: "_Refs", outs: "_Refs", walk: "_Walk", arith: "_Arithmetic") -> None:
    q, tq = (_load(ins[x], walk.stay) for x in ("q", "tq"))

    def visit(keys: _Rows, carry: tuple, masked: bool) -> tuple:
        k, v, tk, tv = (_load(ins[x], keys) for x in ("k", "v", "tk", "tv"))
        m, total, acc, row, t_acc = carry
        m, p, decay = _online(m, walk.scores(q, k, keys, arith, masked))
        t_row, product = _tangent_terms(p, q, k, v, tq, tk, tv, arith)
        acc = decay[:, None] * acc + arith.dot(p.astype(v.dtype), v)
        return m, decay * total + p.sum(axis=1), acc, decay * row + t_row, decay[:, None] * t_acc + product

    start = _constant(walk, -jnp.inf), _constant(walk, 0), _constant(walk, 0, outs["o"])
    m, total, acc, row, t_acc = walk.over(visit, (*start, _constant(walk, 0), _constant(walk, 0, outs["to"])))
    o = _store_forward(outs, walk, m, total, acc)
    weight = 1 / jnp.where(total == 0, 1, total)[:, None]
    _store(outs["to"], walk.stay, weight * (t_acc - row[:, None] * o))


def _dq_body(ins: "_Refs", outs: "_Refs", walk: "_Walk", arith: "_Arithmetic") -> None:
    q, do, lse, delta = (_load(ins[x], walk.stay) for x in ("q", "do", "lse", "delta"))

    def visit(keys: _Rows, dq: Array, masked: bool) -> Array:
        k, v = (_load(ins[x], keys) for x in "kv")
        p = jnp.exp2(walk.scores(q, k, keys, arith, masked) - _base_2(lse)[:, None])
        ds = p * (arith.dot_t(do, v) - delta[:, None])
        return dq + arith.dot(ds.astype(k.dtype), k)

    _store(outs["dq"], walk.stay, arith.scale * walk.over(visit, _constant(walk, 0, outs["dq"])))


# --- and the keys of a tile stay, the queries are walked --------------------------------------------------------------


def _dkv_body(ins: "_Refs", outs: "_Refs", walk: "_Walk", arith: "_Arithmetic") -> None:
    k, v = (_load(ins[x], walk.stay) for x in "kv")

    def visit(queries: _Rows, carry: tuple, masked: bool) -> tuple:
        q, do, lse, delta = (_load(ins[x], queries) for x in ("q", "do", "lse", "delta"))
        # Rows past the last query load as zeros, with do = delta = 0: they add nothing. Columns past the last key are
        # not stored. So only a mask needs masking here.
        p = jnp.exp2(walk.scores(k, q, queries, arith, masked) - _base_2(lse)[None, :])
        ds = p * (arith.dot_t(v, do) - delta[None, :])
        return carry[0] + arith.dot(ds.astype(q.dtype), q), carry[1] + arith.dot(p.astype(do.dtype), do)

    dk, dv = walk.over(visit, (_constant(walk, 0, outs["dk"]), _constant(walk, 0, outs["dv"])))
    _store(outs["dk"], walk.stay, arith.scale * dk)
    _store(outs["dv"], walk.stay, dv)


# --- pieces of the bodies -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Arithmetic:
    """The products of a kernel, summed in float32."""

    scale: float
    interpret: bool

    def dot(self, a: Array, b: Array) -> Array:
        """a b."""
        return self._product(a, b, 0)

    def dot_t(self, a: Array, b: Array) -> Array:
        """a bᵀ."""
        return self._product(a, b, 1)

    def _product(self, a: Array, b: Array, axis: int) -> Array:
        precision = None
        if b.dtype == jnp.float32:  # on tensor cores as three products of TF32 halves: float32 but for the last bits
            exact = jax.lax.Precision.HIGHEST
            precision = exact if self.interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision, jnp.float32)


def _online(m: Array, s: Array) -> tuple[Array, Array, Array]:
    """(new maximum, exp2(s - maximum), by what earlier sums shrink); -inf rows, which see nothing yet, give zeros."""
    new = jnp.maximum(m, s.max(axis=1))
    finite = jnp.where(new == -jnp.inf, 0, new)
    return new, jnp.exp2(s - finite[:, None]), jnp.exp2(m - finite)


def _tangent_terms(
    p: Array, q: Array, k: Array, v: Array, tq: Array | None, tk: Array | None, tv: Array | None, arith: _Arithmetic
) -> tuple[Array, Array]:
    """rowsum(P∘tS) and (P∘tS) V + P tV of one tile, for unnormalised or normalised P."""
    row, product = jnp.zeros(p.shape[0], jnp.float32), jnp.zeros((p.shape[0], v.shape[1]), jnp.float32)
    moving = [(a, b) for a, b in ((tq, k), (q, tk)) if a is not None and b is not None]
    if moving:
        pts = p * (arith.scale * functools.reduce(jnp.add, (arith.dot_t(a, b) for a, b in moving)))
        row, product = pts.sum(axis=1), arith.dot(pts.astype(v.dtype), v)
    if tv is not None:
        product = product + arith.dot(p.astype(tv.dtype), tv)
    return row, product


def _base_2(lse: Array) -> Array:
    """lse in base 2, and 0 where it is -inf: exp2(-inf - 0) is the 0 that a row without keys wants."""
    return jnp.where(lse == -jnp.inf, 0, lse * LOG2_E)


def _store_forward(outs: "_Refs", walk: "_Walk", m: Array, total: Array, acc: Array) -> Array:
    """Stores o and lse of the rows, and returns o in float32."""
    o = acc / jnp.where(total == 0, 1, total)[:, None]
    _store(outs["o"], walk.stay, o)
    _store(outs["lse"], walk.stay, (m + jnp.log2(total)) / LOG2_E)  # -inf + log2(0): -inf for a row without keys
    return o


def _constant(walk: "_Walk", value: float, like: "_Operand | None" = None) -> Array:
    """A float32 accumulator: one number a row of the tile, or as wide as `like`."""
    shape = (walk.stay.size,) if like is None else (walk.stay.size, like.ref.shape[-1])
    return jnp.full(shape, value, jnp.float32)


# --- what a body sees: rows, operands, and the walk -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Rows:
    """`size` rows of an array of `length`, from row `first`. `offset` is where they are in the ref that a body has."""

    first: Int32[Array, ""]
    size: int
    length: int
    offset: Int32[Array, ""] | None  # None: the ref is these rows

    @property
    def index(self) -> Int32[Array, " R"]:
        return self.first + jnp.arange(self.size, dtype=jnp.int32)

    @property
    def inside(self) -> Bool[Array, " R"] | None:
        return self.index < self.length if self.length % self.size else None


@dataclasses.dataclass(frozen=True)
class _Operand:
    """A ref [rows, padded width] of an array that is `width` wide, or a ref [rows] of one that has no width."""

    ref: Any
    width: int | None


_Refs = dict[str, _Operand | None]


def _view(operand: _Operand, rows: _Rows) -> tuple[Any, Array | None]:
    """The part of the ref that holds the rows, and which of its elements exist (None: all)."""
    index = slice(None) if rows.offset is None else pl.ds(rows.offset, rows.size)
    if operand.width is None:
        return operand.ref.at[index], rows.inside
    padded = operand.ref.shape[-1]
    exists = None if rows.inside is None else rows.inside[:, None]
    if operand.width < padded:
        columns = (jnp.arange(padded, dtype=jnp.int32) < operand.width)[None, :]
        exists = columns if exists is None else exists & columns
    if exists is not None:
        exists = jnp.broadcast_to(exists, (rows.size, padded))
    return operand.ref.at[index, :], exists


def _load(operand: _Operand | None, rows: _Rows) -> Array | None:
    """The rows, 0 where there is nothing. An operand that is None stays None."""
    if operand is None:
        return None
    view, exists = _view(operand, rows)
    return plgpu.load(view, mask=exists, other=None if exists is None else 0)


def _store(operand: _Operand, rows: _Rows, value: Array) -> None:
    view, exists = _view(operand, rows)
    plgpu.store(view, value.astype(operand.ref.dtype), mask=exists)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A tile of rows that stays, and the tiles of the other side that it visits, in `segments` where there are runs.

    A segment (lo, split, hi) is tiles [lo, split), where every pair is allowed, then [split, hi), where scores need
    the mask. Without runs the segments follow from the lengths and kv_len.
    """

    stay: _Rows
    keys_stay: bool
    length: int  # of the walked side
    block: int  # walked rows at a time
    segments: Any  # ref [segments, 3] or None
    runs: Any  # ref [2, runs, query rows] of starts and ends, or None
    kv_len: Int32[Array, ""] | None

    def over(self, visit: Callable[[_Rows, Any, bool], Any], carry: Any) -> Any:
        """visit(rows, carry, masked) -> carry, over all tiles that the walk touches."""

        def tiles(masked: bool) -> Callable:
            def step(i: Int32[Array, ""], carry: Any) -> Any:
                first = i * self.block
                return visit(_Rows(first, self.block, self.length, first), carry, masked)

            return step

        def segment(i: Int32[Array, ""] | int, carry: Any) -> Any:
            lo, split, hi = self._bounds(i)
            carry = jax.lax.fori_loop(lo, split, tiles(False), carry)
            return carry if isinstance(split, int) and split == hi else jax.lax.fori_loop(split, hi, tiles(True), carry)

        if self.segments is None or self.segments.shape[0] == 1:
            return segment(0, carry)
        return jax.lax.fori_loop(0, self.segments.shape[0], segment, carry)

    def _bounds(self, i: Int32[Array, ""] | int) -> tuple:
        """(lo, split, hi) of segment i, with kv_len taken into account."""
        tiles, whole = pl.cdiv(self.length, self.block), self.length // self.block
        if self.segments is not None:
            lo, split, hi = (self.segments[i, j] for j in range(3))
        else:
            lo, split, hi = 0, tiles if self.keys_stay else whole, tiles
        if self.kv_len is None:
            return lo, split, hi
        if self.keys_stay:  # all queries see the tile's keys below kv_len
            first = self.stay.first
            some = (first < self.kv_len).astype(jnp.int32)
            every = (first + self.stay.size <= self.kv_len).astype(jnp.int32)
            return lo, lo + every * (split - lo), lo + some * (hi - lo)  # (a select of plain ints does not lower)
        full = self.kv_len // self.block
        hi = jnp.clip((self.kv_len + self.block - 1) // self.block, lo, hi)
        return lo, jnp.clip(full, lo, jnp.minimum(split, hi)), hi

    def scores(self, stay: Array, moving: Array, rows: _Rows, arith: _Arithmetic, masked: bool) -> Array:
        """scale · stay movingᵀ in base 2, and -inf where a `masked` tile's pair is not allowed."""
        s = arith.dot_t(stay, moving) * (arith.scale * LOG2_E)
        if not masked:
            return s
        return jnp.where(self._seen(rows), s, -jnp.inf)

    def _seen(self, rows: _Rows) -> Bool[Array, "stay moving"]:
        """Which pairs of the two tiles are allowed."""
        queries, keys = (rows, self.stay) if self.keys_stay else (self.stay, rows)
        key, query_axis = (keys.index[:, None], 0) if self.keys_stay else (keys.index[None, :], 1)
        shape = (self.stay.size, rows.size)
        seen = jnp.broadcast_to(key < (keys.length if self.kv_len is None else self.kv_len), shape)
        if self.runs is None:
            return seen
        at = slice(None) if queries.offset is None else pl.ds(queries.offset, queries.size)
        other = None if queries.inside is None else 0
        within = jnp.zeros(shape, bool)
        for r in range(self.runs.shape[1]):
            sides = (self.runs.at[jnp.int32(j), jnp.int32(r), at] for j in range(2))  # plain ints do not interpret
            bounds = (plgpu.load(side, mask=queries.inside, other=other) for side in sides)
            start, end = (jnp.expand_dims(x, query_axis) for x in bounds)
            within |= (start <= key) & (key < end)
        return seen & within


# --- the calls --------------------------------------------------------------------------------------------------------

_OUTS: dict[str, dict[str, str | None]] = {  # results, and the operand that each is as wide as (None: one number a row)
    "forward": {"o": "v", "lse": None},
    "tangent": {"to": "v"},
    "fused": {"o": "v", "lse": None, "to": "v"},
    "dq": {"dq": "q"},
    "dkv": {"dk": "k", "dv": "v"},
}
_BODIES = {
    "forward": _forward_body, "tangent": _tangent_body, "fused": _fused_body, "dq": _dq_body, "dkv": _dkv_body,
}  # fmt: skip
_BY_KEY = {"k", "v", "tk", "tv", "dk", "dv"}  # the other arrays have a row for each query


def run(
    kind: str, arrays: dict[str, Array | None], mask: KeyRuns | None, scale: float, tiles: Tiles | None
) -> tuple[Array, ...]:
    """One kernel over all tiles, heads and samples: on CUDA compiled, anywhere else interpreted."""
    q, k, v = (arrays[x] for x in "qkv")
    call = functools.partial(_pallas_call, kind, tiles or tiles_for(kind, q, k, v), scale, mask, tuple(arrays))
    present = {name: x for name, x in arrays.items() if x is not None}
    kv_len = None if mask is None else mask.kv_len
    operands = present if kv_len is None else present | {"kv_len": jnp.asarray(kv_len, jnp.int32).reshape(1)}
    return jax.lax.platform_dependent(
        operands, cuda=functools.partial(call, interpret=False), default=functools.partial(call, interpret=True)
    )


def _pallas_call(
    kind: str, tiles: Tiles, scale: float, mask: KeyRuns | None, names: tuple[str, ...], arrays: dict[str, Array],
    *, interpret: bool,
) -> tuple[Array, ...]:  # fmt: skip
    q = arrays["q"]
    (B, S, N, _), K = q.shape, arrays["k"].shape[1]
    keys_stay = kind == "dkv"
    (stay_len, stay), (walk_len, block) = (S, tiles.block_q), (K, tiles.block_k)
    if keys_stay:
        (stay_len, stay), (walk_len, block) = (walk_len, block), (stay_len, stay)

    def spec(by_key: bool, length: int, width: int | None) -> pl.BlockSpec:
        rows, tile = (stay, True) if by_key == keys_stay else (length, False)
        if width is None:
            return pl.BlockSpec((None, None, rows), lambda i, n, b: (b, n, i if tile else 0))
        return pl.BlockSpec(
            (None, rows, None, max(MIN_BLOCK, pl.next_power_of_2(width))), lambda i, n, b: (b, i if tile else 0, n, 0)
        )

    ins, in_specs, widths = [], [], {}
    for name in names:
        x = arrays.get(name)
        if x is None:
            continue
        widths[name] = x.shape[-1] if x.ndim == 4 else None
        ins.append(x)
        in_specs.append(spec(name in _BY_KEY, x.shape[1] if x.ndim == 4 else x.shape[2], widths[name]))
    extra = {}
    if mask is not None and mask.query_ends:
        extra["segments"] = jnp.asarray(tile_segments(mask, S, K, tiles.block_q, tiles.block_k, keys_stay=keys_stay))
        extra["runs"] = row_runs(mask).transpose(2, 1, 0)
        in_specs.append(pl.BlockSpec((None, *extra["segments"].shape[1:]), lambda i, n, b: (i, 0, 0)))
        runs = extra["runs"].shape[1]
        in_specs.append(
            pl.BlockSpec((2, runs, S), lambda i, n, b: (0, 0, 0)) if keys_stay
            else pl.BlockSpec((2, runs, stay), lambda i, n, b: (0, 0, i))
        )  # fmt: skip
    if "kv_len" in arrays:
        extra["kv_len"] = arrays["kv_len"]
        in_specs.append(pl.BlockSpec((1,), lambda i, n, b: (0,)))

    out_widths = {name: None if like is None else arrays[like].shape[-1] for name, like in _OUTS[kind].items()}
    out_shapes, out_specs = [], []
    for name, width in out_widths.items():
        by_key = name in _BY_KEY
        length = K if by_key else S
        shape, dtype = ((B, N, length), jnp.float32) if width is None else ((B, length, N, width), q.dtype)
        out_shapes.append(jax.ShapeDtypeStruct(shape, dtype))
        out_specs.append(spec(by_key, length, width))

    def kernel(*refs: Any) -> None:
        named = dict(zip((*widths, *extra, *out_widths), refs, strict=True))
        operands = {name: _Operand(named[name], widths[name]) if name in widths else None for name in names}
        results = {name: _Operand(named[name], width) for name, width in out_widths.items()}
        rows = _Rows(pl.program_id(0) * stay, stay, stay_len, None)
        kv_len = jnp.minimum(named["kv_len"][0], K) if "kv_len" in named else None
        walk = _Walk(rows, keys_stay, walk_len, block, named.get("segments"), named.get("runs"), kv_len)
        _BODIES[kind](operands, results, walk, _Arithmetic(scale, interpret))

    return tuple(
        pl.pallas_call(
            kernel,
            out_shape=out_shapes,
            grid=(pl.cdiv(stay_len, stay), N, B),
            in_specs=in_specs,
            out_specs=out_specs,
            compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
            interpret=interpret,
            name=f"attention_{kind}",
        )(*ins, *extra.values())
    )
