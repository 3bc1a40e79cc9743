"""Flash attention with its tangent and its transpose, as Pallas kernels on the Triton route. NVIDIA GPUs, sm_80 on.

The mathematics is that of `xla.py`, tile by tile: one program a tile of queries (of keys, for dk and dv) of one head,
which walks the tiles of the other side that the mask lets it touch. With lse known only `forward` and `fused` rescale.
docs/kernels.md derives it all.

Everything is summed in float32; matrix products take their operands in the input dtype (float32 as three TF32 products,
which keep all but its last bits). Scores are kept in base 2, as exp2 is what the hardware has. Tiles that reach past
the end of an array are loaded under a mask, so no operand is ever copied to be padded; head widths that are no power of
two are padded in registers. On any device that is not CUDA the same kernels are interpreted: right, and slow.

The order of the products in a body is the one that leaves the compiler most registers: docs/kernels.md.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rcm_jax.kernels.joining import join
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.pallas_kernel import Kernel
from rcm_jax.kernels.pallas_parts import multiprocessors, parts_for
from rcm_jax.kernels.pallas_read import as_stored, read_keys, read_values
from rcm_jax.kernels.pallas_sums import add_tangent, base_2, constant, online, store_forward
from rcm_jax.kernels.pallas_walk import Arithmetic, Refs, Rows, Walk, load, store
from rcm_jax.kernels.past import Past
from rcm_jax.kernels.tiles import Tiles, tiles_for

DTYPES = ("bfloat16", "float16", "float32")
MAX_WIDTH = 256
AUTO_MAX_WIDTH = {"bfloat16": 256, "float16": 256, "float32": 64}  # float32 heads wider than this spill registers

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
    tiles = tiles or tiles_for("forward", q, k, v)
    return in_parts(q, k, v, mask, scale, tiles, parts_for(q, k, tiles, multiprocessors()))


def forward_of_layer(
    q: Query, k: Float[Array, "L B K N D"], v: Float[Array, "L B K N V"], layer: Int[Array, ""], mask: KeyRuns | None,
    scale: float, *, tiles: Tiles | None = None,
) -> tuple[Out, Lse]:  # fmt: skip
    """`forward` with the keys of one layer of a stack, which are read where they lie."""
    _check_served(q, v)
    k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    tiles = tiles or tiles_for("forward", q, k, v)
    return in_parts(q, k, v, mask, scale, tiles, parts_for(q, k, tiles, multiprocessors()), layer * q.shape[0])


def forward_of_past(
    q: Query, past: Past, mask: KeyRuns | None, scale: float, *, tiles: Tiles | None = None, parts: int | None = None
) -> tuple[Out, Lse]:
    """`forward` with keys that are read as they are stored: `choice.not_read` says which cannot be."""
    _check_served(q, q)
    arrays, about = as_stored(past, q)
    keys = jax.ShapeDtypeStruct((q.shape[0], arrays.get("rows", arrays["k"]).shape[1], *q.shape[2:]), q.dtype)
    tiles = tiles or tiles_for("forward_of_past", q, keys, q)
    parts = parts or parts_for(q, keys, tiles, multiprocessors())
    return _joined(FORWARD_OF_PAST({"q": q} | arrays, mask, scale, tiles, parts, about), parts, q.dtype)


def in_parts(
    q: Query, k: Key, v: Value, mask: KeyRuns | None, scale: float, tiles: Tiles, parts: int,
    first: Int[Array, ""] | None = None,
) -> tuple[Out, Lse]:  # fmt: skip
    """`forward` with the keys of each program cut into so many parts, which are joined. `first`: see `Kernel`."""
    return _joined(FORWARD({"q": q, "k": k, "v": v, "first": first}, mask, scale, tiles, parts), parts, q.dtype)


def _joined(results: tuple[Array, Array], parts: int, dtype: jnp.dtype) -> tuple[Out, Lse]:
    o, lse = results
    if parts > 1:
        o, lse = join(o, lse)
    return o.astype(dtype), lse


def tangent(
    q: Query, k: Key, v: Value, o: Out, lse: Lse, tq: Query | None, tk: Key | None, tv: Value | None,
    mask: KeyRuns | None, scale: float, *, tiles: Tiles | None = None,
) -> Out:  # fmt: skip
    """to, linear in (tq, tk, tv); each may be None for zero, and its products are left out."""
    arrays = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "tq": tq, "tk": tk, "tv": tv}
    return TANGENT(arrays, mask, scale, tiles)[0]


def fused(
    q: Query, k: Key, v: Value, tq: Query | None, tk: Key | None, tv: Value | None, mask: KeyRuns | None,
    scale: float, *, tiles: Tiles | None = None,
) -> tuple[Out, Lse, Out]:  # fmt: skip
    """(o, lse, to) from one walk over the keys: 6 matrix products, where `forward` and `tangent` take 2 + 5."""
    _check_served(q, v)
    return FUSED({"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv}, mask, scale, tiles)


def backward(
    q: Query, k: Key, v: Value, o: Out, lse: Lse, do: Out, mask: KeyRuns | None, scale: float,
    *, tiles: Tiles | None = None,
) -> tuple[Query, Key, Value]:  # fmt: skip
    """(dq, dk, dv). dq walks the keys and (dk, dv) the queries, in two kernels: no atomics, so repeatable."""
    # not an einsum: XLA would transpose o for it, of all layers at once, outside the scan over them
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    arrays = {"q": q, "k": k, "v": v, "do": do, "lse": lse, "delta": delta}
    return DQ(arrays, mask, scale, tiles) + DKV(arrays, mask, scale, tiles)


def _check_served(q: Query, v: Value) -> None:
    if q.dtype.name not in DTYPES:
        raise NotImplementedError(f"the Pallas kernels take {DTYPES}, not {q.dtype}; use implementation='xla'")
    for name, width in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if width > MAX_WIDTH:
            raise NotImplementedError(
                f"{name} have head width {width}; the Pallas kernels take at most {MAX_WIDTH}: use implementation='xla'"
            )


# --- bodies: the queries of a tile stay, the keys are walked ---------------------------------------------------------


def _forward_body(ins: Refs, outs: Refs, walk: Walk, arith: Arithmetic) -> None:
    q = load(ins["q"], walk.stay)

    def visit(keys: Rows, carry: tuple, masked: bool) -> tuple:
        k, v = (read(ins, keys, q.dtype) for read in (read_keys, read_values))
        m, total, acc = carry
        m, p, decay = online(m, walk.scores(q, k, keys, arith, masked), arith, guard=masked and walk.runs is not None)
        return m, decay * total + p.sum(axis=1), decay[:, None] * acc + arith.dot(p.astype(v.dtype), v)

    start = constant(walk, -jnp.inf), constant(walk, 0), constant(walk, 0, outs["o"])
    store_forward(outs, walk, *walk.over(visit, start), arith)


FORWARD = Kernel(
    "forward",
    _forward_body,
    stays="queries",
    operands={"q": "queries", "k": "keys", "v": "keys"},
    outputs={"o": "v", "lse": None},
)

FORWARD_OF_PAST = Kernel(  # read as it is stored
    "forward",
    _forward_body,
    stays="queries",
    operands={"q": "queries"} | dict.fromkeys(("k", "v", "k_scale", "v_scale", "cos", "sin"), "keys"),
    outputs={"o": "q", "lse": None},
)


def _tangent_body(ins: Refs, outs: Refs, walk: Walk, arith: Arithmetic) -> None:
    q, tq, o = (load(ins[x], walk.stay) for x in ("q", "tq", "o"))
    lse = base_2(load(ins["lse"], walk.stay), walk)

    def visit(keys: Rows, carry: tuple, masked: bool) -> tuple:
        k, v, tk, tv = (load(ins[x], keys) for x in ("k", "v", "tk", "tv"))
        p = arith.exp2(walk.scores(q, k, keys, arith, masked), lse[:, None])
        return add_tangent(*carry, p, q, k, v, tq, tk, tv, arith)

    row, acc = walk.over(visit, (constant(walk, 0), constant(walk, 0, outs["to"])))
    store(outs["to"], walk.stay, acc - row[:, None] * o.astype(jnp.float32))


TANGENT = Kernel(
    "tangent",
    _tangent_body,
    stays="queries",
    operands={
        "q": "queries", "k": "keys", "v": "keys", "o": "queries", "lse": "queries",
        "tq": "queries", "tk": "keys", "tv": "keys",
    },
    outputs={"to": "v"},
)  # fmt: skip


def _fused_body(ins: Refs, outs: Refs, walk: Walk, arith: Arithmetic) -> None:
    q, tq = (load(ins[x], walk.stay) for x in ("q", "tq"))

    def visit(keys: Rows, carry: tuple, masked: bool) -> tuple:
        k, v, tk, tv = (load(ins[x], keys) for x in ("k", "v", "tk", "tv"))
        m, total, acc, row, t_acc = carry
        m, p, decay = online(m, walk.scores(q, k, keys, arith, masked), arith, guard=masked and walk.runs is not None)
        row, t_acc = add_tangent(decay * row, decay[:, None] * t_acc, p, q, k, v, tq, tk, tv, arith)
        acc = decay[:, None] * acc + arith.dot(p.astype(v.dtype), v)
        return m, decay * total + p.sum(axis=1), acc, row, t_acc

    start = constant(walk, -jnp.inf), constant(walk, 0), constant(walk, 0, outs["o"])
    m, total, acc, row, t_acc = walk.over(visit, (*start, constant(walk, 0), constant(walk, 0, outs["to"])))
    o = store_forward(outs, walk, m, total, acc, arith)
    weight = 1 / jnp.where(total == 0, 1, total)[:, None]
    store(outs["to"], walk.stay, weight * (t_acc - row[:, None] * o))


FUSED = Kernel(
    "fused",
    _fused_body,
    stays="queries",
    operands={"q": "queries", "k": "keys", "v": "keys", "tq": "queries", "tk": "keys", "tv": "keys"},
    outputs={"o": "v", "lse": None, "to": "v"},
)


def _dq_body(ins: Refs, outs: Refs, walk: Walk, arith: Arithmetic) -> None:
    q, do, lse, delta = (load(ins[x], walk.stay) for x in ("q", "do", "lse", "delta"))
    lse = base_2(lse, walk)

    def visit(keys: Rows, dq: Array, masked: bool) -> Array:
        k, v = (load(ins[x], keys) for x in "kv")
        p = arith.exp2(walk.scores(q, k, keys, arith, masked), lse[:, None])
        ds = p * (arith.dot_t(do, v) - delta[:, None])
        return dq + arith.dot(ds.astype(k.dtype), k)

    store(outs["dq"], walk.stay, arith.scale * walk.over(visit, constant(walk, 0, outs["dq"])))


DQ = Kernel(
    "dq",
    _dq_body,
    stays="queries",
    operands={"q": "queries", "k": "keys", "v": "keys", "do": "queries", "lse": "queries", "delta": "queries"},
    outputs={"dq": "q"},
)


# --- and the keys of a tile stay, the queries are walked --------------------------------------------------------------


def _dkv_body(ins: Refs, outs: Refs, walk: Walk, arith: Arithmetic) -> None:
    k, v = (load(ins[x], walk.stay) for x in "kv")

    def visit(queries: Rows, carry: tuple, masked: bool) -> tuple:
        q, do, lse, delta = (load(ins[x], queries) for x in ("q", "do", "lse", "delta"))
        # Rows past the last query load as zeros, with do = delta = 0: they add nothing.
        p = arith.exp2(walk.scores(k, q, queries, arith, masked), base_2(lse, walk)[None, :])
        dv = carry[1] + arith.dot(p.astype(do.dtype), do)
        ds = p * (arith.dot_t(v, do) - delta[None, :])
        return carry[0] + arith.dot(ds.astype(q.dtype), q), dv

    dk, dv = walk.over(visit, (constant(walk, 0, outs["dk"]), constant(walk, 0, outs["dv"])))
    store(outs["dk"], walk.stay, arith.scale * dk)
    store(outs["dv"], walk.stay, dv)


DKV = Kernel(
    "dkv",
    _dkv_body,
    stays="keys",
    operands={"q": "queries", "k": "keys", "v": "keys", "do": "queries", "lse": "queries", "delta": "queries"},
    outputs={"dk": "k", "dv": "v"},
)
