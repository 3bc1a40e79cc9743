"""How a tile of keys or values that lies in a cache becomes an operand of a product, in registers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from rcm_jax.kernels.pallas_walk import Operand, Refs, Rows, load
from rcm_jax.kernels.past import Past
from rcm_jax.kernels.turning import turned
from rcm_jax.quant import Stored
from rcm_jax.quant.codes import BITS, FLOAT8

# --- what the kernel is given of a past -------------------------------------------------------------------------------


def as_stored(past: Past, q: Float[Array, "B S N D"]) -> tuple[dict[str, Array | None], dict[str, str]]:
    """The kernel's operands beside q, none of which is as large as a layer's keys or a copy of stored ones; and what
    those that are codes stand for."""
    arrays, codes = {}, {}
    for name, x in (("k", past.k), ("v", past.v)):
        arrays[name], arrays[f"{name}_scale"] = _by_slots(x)
        if arrays[f"{name}_scale"] is not None:
            codes[name] = x.config.dtype
    L, C, B, S = arrays["k"].shape[:4]
    if past.rows is None and 1 in (B, C):
        shape, place = ((L, C * S) if B == 1 else (L * B, S)), {"first": past.layer * B}
    else:
        shape, place = (1, L * C * B * S), {"rows": _rows(past, B, C, S)}
    arrays = {name: None if x is None else x.reshape(*shape, *x.shape[4:]) for name, x in arrays.items()}
    table = (
        {} if past.rope is None else dict(zip(("cos", "sin"), (_narrow(x, q.dtype) for x in past.rope), strict=True))
    )
    return arrays | place | table, codes


def _by_slots(x: Array | Stored) -> tuple[Array, Array | None]:
    """Payload [L, C, B, S, N, bytes or numbers of a head] and scales [L, C, B, S, N, groups], as views."""
    if not isinstance(x, Stored):
        return x[:, None], None
    B, S, N, _ = x.shape
    lead = x.payload.shape[:2]
    return tuple(None if y is None else _bytes(y).reshape(*lead, B, S, N, -1) for y in (x.payload, x.scale))


def _bytes(x: Array) -> Array:
    """float8 as what it is in memory: Pallas has no zeros of it to load beside rows that exist."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == FLOAT8 else x


def _rows(past: Past, B: int, C: int, S: int) -> Int[Array, "B K"]:
    """Where in all rows of all layers, slots and samples each sample's keys lie."""
    token = jnp.arange(C * S, dtype=jnp.int32) if past.rows is None else past.rows.astype(jnp.int32)
    first = ((past.layer * C + token // S) * B)[None] + jnp.arange(B, dtype=jnp.int32)[:, None]
    return first * S + (token % S)[None]


def _narrow(x: Float[Array, "K h"], dtype: jnp.dtype) -> Float[Array, "K h"]:
    """cos and sin beside numbers of two bytes are float16: off by 2^-12, where turned keys are rounded to 2^-9 of
    their size. As float32 they would be twice a key's bytes, and every program reads them."""
    return x if dtype.itemsize > 2 else x.astype(jnp.float16)


# --- what the kernel makes of a tile ----------------------------------------------------------------------------------


def read_keys(ins: Refs, rows: Rows, dtype: jnp.dtype) -> Float[Array, "keys D"]:
    """In `dtype`, turned by RoPE where there is a table of it."""
    k = _numbers(ins["k"], ins.get("k_scale"), rows)
    if ins.get("cos") is None:
        return k.astype(dtype)
    return turned(k, *(load(ins[name], rows) for name in ("cos", "sin"))).astype(dtype)


def read_values(ins: Refs, rows: Rows, dtype: jnp.dtype) -> Float[Array, "keys D"]:
    return _numbers(ins["v"], ins.get("v_scale"), rows).astype(dtype)


def _numbers(operand: Operand, scale: Operand | None, rows: Rows) -> Float[Array, "keys D"]:
    """As they are, or in float32 where they are codes with scales."""
    x = load(operand, rows)
    if scale is None:
        return x
    x, scale = _decoded(x, operand.code), _scales(load(scale, rows))
    size, groups = scale.shape
    return (x.reshape(size, groups, -1) * scale[:, :, None]).reshape(x.shape)


def _decoded(x: Array, code: str) -> Float[Array, "keys D"]:
    """What codes stand for. Those that share a byte are neighbours in a head, the first in its lowest bits."""
    if code == "fp8":
        return jax.lax.bitcast_convert_type(x, FLOAT8).astype(jnp.float32)
    if code not in BITS:
        return x.astype(jnp.float32)
    x = _apart(x.astype(jnp.int32), BITS[code], 8 // BITS[code])
    return _fp4(x) if code == "fp4" else x.astype(jnp.float32) - {"int4": 8.0, "int2": 1.5}[code]


def _apart(x: Array, bits: int, each: int) -> Array:
    """So many codes of a byte side by side: halves are taken apart until one is left in each."""
    if each == 1:
        return x & (2**bits - 1)
    # the first and third of four, then the second and fourth: put together in pairs they are in order again
    even, odd = (_every_second(x, bits, each, first) for first in (0, 1))
    return jax.lax.stack([even, odd], axis=x.ndim).reshape(x.shape[0], -1)


def _every_second(x: Array, bits: int, each: int, first: int) -> Array:
    if each == 2:
        return (x >> (bits * first)) & (2**bits - 1)
    parts = [(x >> (bits * (first + 2 * i))) & (2**bits - 1) for i in range(2)]
    return jax.lax.stack(parts, axis=x.ndim).reshape(x.shape[0], -1)


# Numbers of fewer bits are float16 whose exponent is too small: no float8 is asked of a compiler, which has none before
# compute capability 8.9, and sizes below the normal range come out right.


def _scales(x: UInt8[Array, "keys groups"]) -> Float[Array, "keys groups"]:
    """float8 (e4m3), none of them negative, by its bits."""
    return _half(x.astype(jnp.int32) << 7) * 2.0**8


def _fp4(x: Int[Array, "..."]) -> Float[Array, "..."]:
    """codes.FP4 by its bits: codes rise from -6 to 6, and a size's three are the last two of an exponent and a half."""
    negative = 1 - (x >> 3)
    return _half((((x & 7) ^ (7 * negative)) << 9) | (negative << 15)) * 2.0**14


def _half(bits: Int[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
