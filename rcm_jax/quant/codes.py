"""Numbers to codes and back, each group by its own scale, and codes packed into bytes.

All codes are symmetric around 0. Scales are stored in float8.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

INT2 = (-1.5, -0.5, 0.5, 1.5)
FP4 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_DISTINCT = tuple(dict.fromkeys(FP4))  # -0.0 and 0.0 are one
GREATEST = {"int8": 127.0, "int4": 7.0, "int2": 1.5, "fp8": 448.0, "fp4": 6.0}  # what a scale maps amax to
BITS = {"int4": 4, "int2": 2, "fp4": 4}  # of codes that share bytes
FLOAT8 = jnp.float8_e4m3fn

Scale = Float[Array, "rows groups 1"]


def to_bfloat16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounded to bfloat16. A mere cast and one back are nothing to a compiler that may keep excess precision."""
    return jax.lax.reduce_precision(x.astype(jnp.float32), 8, 7).astype(jnp.bfloat16)


def to_float8(x: Float[Array, "..."], rounded: Callable[[Array], Array] = jnp.round) -> Float[Array, "..."]:
    """Rounded to e4m3fn, half to even (or as `rounded` does to whole numbers); beyond its range, its greatest number.

    Rounded by arithmetic, so that the cast is exact: backends go through float16 (rounding twice) or leave the cast
    out where another one follows.
    """
    x = jnp.clip(x, -448.0, 448.0)
    _, exponent = jnp.frexp(x)
    step = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - 4, -9))  # 3 bits of fraction; 2^-9 below the normal range
    return (rounded(x / step) * step).astype(FLOAT8)


def scale_of(x: Float[Array, "rows groups size"], dtype: str) -> Scale:
    """Each group's scale, in float32."""
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-8)
    # a compiler multiplies by the inverse of a constant it sees, which is another number
    return amax / jax.lax.optimization_barrier(jnp.float32(GREATEST[dtype]))


def _nearest(x: Float[Array, "..."], levels: tuple[float, ...]) -> Int[Array, "..."]:
    """The index of the nearest of rising levels, the lower of two: distances in float32 decide, as published."""
    return sum((x - low > high - x).astype(jnp.int32) for low, high in zip(levels, levels[1:], strict=False))


def encode(x: Float[Array, "rows groups size"], scale: Scale, dtype: str) -> Array:
    """Codes: int8; float8; or uint8 with `BITS` of them used."""
    x = x / scale
    match dtype:
        case "int8":
            return jnp.clip(jnp.round(x), -128, 127).astype(jnp.int8)
        case "int4":
            return (jnp.clip(jnp.round(x), -8, 7) + 8).astype(jnp.uint8)
        case "int2":
            return _nearest(x, INT2).astype(jnp.uint8)
        case "fp4":
            index = _nearest(x, FP4_DISTINCT)
            return (index + (index > FP4.index(0.0))).astype(jnp.uint8)
        case "fp8":
            return to_float8(x)
    raise ValueError(f"{dtype=} must be one of {', '.join(GREATEST)}")


def decode(codes: Array, dtype: str) -> Float[Array, "..."]:
    """What codes stand for, in float32, before their scale. Elementwise, so a kernel may do it where it reads."""
    match dtype:
        case "int4":
            return codes.astype(jnp.float32) - 8
        case "int2":
            return codes.astype(jnp.float32) - 1.5
        case "fp4":
            return jnp.array(FP4, jnp.float32)[codes]
    return codes.astype(jnp.float32)


def pack(codes: UInt8[Array, "..."], bits: int) -> UInt8[Array, " bytes"]:
    """All codes in a row, the first in a byte's lowest bits; codes of 0 fill the last byte."""
    each = 8 // bits
    codes = jnp.pad(codes.reshape(-1), (0, -codes.size % each)).reshape(-1, each)
    return sum(codes[:, i] << (bits * i) for i in range(each))


def unpack(packed: UInt8[Array, " bytes"], bits: int, shape: tuple[int, ...]) -> UInt8[Array, "..."]:
    """The codes of `pack`, in this shape."""
    codes = jnp.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], axis=-1)
    return codes.reshape(-1)[: math.prod(shape)].reshape(shape)


def codes_a_byte(dtype: str) -> int:
    return 8 // BITS.get(dtype, 8)


def payload_of(codes: Array, dtype: str) -> Int8[Array, "..."] | UInt8[Array, "..."] | Float[Array, "..."]:
    return pack(codes, BITS[dtype]) if dtype in BITS else codes


def codes_of(payload: Array, dtype: str, shape: tuple[int, ...]) -> Array:
    return unpack(payload, BITS[dtype], shape) if dtype in BITS else payload
