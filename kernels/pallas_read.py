"""How a tile of keys or values that lies in a cache becomes an operand of a product, in registers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from rcm_jax.kernels.pallas_walk import Operand, Refs, Rows, Shared, load
from rcm_jax.kernels.past import Past
from rcm_jax.kernels.turning import turned
from rcm_jax.quant import Stored
from rcm_jax.quant.codes import BITS, FLOAT8
from rcm_jax.quant.groups import shared_by

# --- what the kernel is given of a past -------------------------------------------------------------------------------


def as_stored(past: Past, q: Float[Array, "B S N D"]) -> tuple[dict[str, Array | None], dict[str, dict[str, Any]]]:
    """The kernel's operands beside q, none of which is as large as a layer's keys or a copy of stored ones; and what
    else those are that are codes or their scales, as fields of `Operand`."""
    arrays, about = {}, {}
    for name, x in (("k", past.k), ("v", past.v)):
        arrays[name], scale = _by_slots(x)
        if scale is not None:
            arrays[f"{name}_scale"], about[name] = scale, {"code": x.config.dtype}
            about[f"{name}_scale"] = {"shared": _shared(x)}
    L, C, B, S = arrays["k"].shape[:4]
    if past.rows is None and 1 in (B, C):
        samples, place = L if B == 1 else L * B, {"first": past.layer * B}
    else:
        samples, place = 1, {"rows": _rows(past, B, C, S)}
    arrays = {name: x.reshape(samples, -1, *x.shape[4:]) for name, x in arrays.items()}
    table = (
        {} if past.rope is None else dict(zip(("cos", "sin"), (_narrow(x, q.dtype) for x in past.rope), strict=True))
    )
    return arrays | place | table, about


def _by_slots(x: Array | Stored) -> tuple[Array, Array | None]:
    """Payload [L, C, B, S, N, bytes or numbers of a head] and scales [L, C, B, groups of tokens, N, of channels]."""
    if not isinstance(x, Stored):
        return x[:, None], None
    return _bytes(x.payload), None if x.scale is None else _bytes(x.scale)


def _shared(x: Stored) -> Shared | None:
    """Which tokens of a slot share a row of scales; None where each has its own."""
    each, _ = shared_by(x.shape, x.config.granularity, x.config.group_size)
    return None if each == 1 else Shared(x.shape[1], x.scale.shape[-3], each)


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
    parts = _decoded(x, operand.code)
    if scale.width == len(parts) * x.shape[1]:  # one for each channel, in the order of the parts
        scales = (_scales(load(scale, rows, (i, len(parts)))) for i in range(len(parts)))
        return _side_by_side([part * each for part, each in zip(parts, scales, strict=True)])
    x, scale = _side_by_side(parts), _scales(load(scale, rows))
    size, groups = scale.shape
    return (x.reshape(size, groups, -1) * scale[:, :, None]).reshape(x.shape)


def _decoded(x: Array, code: str) -> list[Float[Array, "keys bytes"]]:
    """What codes stand for: of those that share a byte, which are neighbours in a head, all first ones, in the lowest
    bits, then all second ones."""
    if code == "fp8":
        return [jax.lax.bitcast_convert_type(x, FLOAT8).astype(jnp.float32)]
    if code not in BITS:
        return [x.astype(jnp.float32)]
    x, bits = x.astype(jnp.int32), BITS[code]
    parts = [(x >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    if code == "fp4":
        return [_fp4(part) for part in parts]
    return [part.astype(jnp.float32) - {"int4": 8.0, "int2": 1.5}[code] for part in parts]


def _side_by_side(parts: list[Float[Array, "keys bytes"]]) -> Float[Array, "keys D"]:
    """In the order of the head's channels again."""
    if len(parts) == 1:
        return parts[0]
    # the first and third of four, then the second and fourth: put together in pairs they are in order again
    even, odd = (_side_by_side(parts[first::2]) for first in (0, 1))
    return jax.lax.stack([even, odd], axis=even.ndim).reshape(even.shape[0], -1)


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
