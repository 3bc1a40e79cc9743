"""A chunk's keys or values as they lie in a cache: made by `store`, read by `restore`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, BFloat16, Float

from rcm_jax.errors import ArgumentError
from rcm_jax.quant import clusters, codes, groups, smoothing
from rcm_jax.quant.config import QuantConfig
from rcm_jax.quant.groups import Heads, Shape

Warm = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """One chunk of keys or of values.

    payload: int8 or float8 [rows, groups, size]; 4 and 2 bits as bytes in a row; bfloat16 [B, S, N, D].
    scale: float8 [rows, groups, 1]; None beside bfloat16.
    undo: what takes the smoothing back: channels' scales, the channels' places, clusters, or nothing.
    config, shape: static; the shape of x.
    by_token: static; whether payload and scale lie as `laid_by_token` has put them.
    """

    payload: Array
    scale: Array | None
    undo: Any
    config: QuantConfig
    shape: Shape
    by_token: bool = False


jax.tree_util.register_dataclass(Stored, ["payload", "scale", "undo"], ["config", "shape", "by_token"])


def _smoothed(x: Heads, config: QuantConfig, warm: Warm, heads_axis: str | None) -> tuple[Heads, Any, Warm]:
    match config.smoothing:
        case "clip":
            return smoothing.clip(x, config.clip_percentile), None, ()
        case "balance":
            scale = smoothing.channel_scale(x, config.smooth_alpha)
            return x / scale, codes.to_bfloat16(scale), ()
        case "hadamard":
            return smoothing.hadamard(x), None, ()
        case "reorder":
            order = smoothing.falling_order(x)
            places = jnp.argsort(order, axis=-1).astype(jnp.uint8 if x.shape[-1] <= 256 else jnp.int16)
            return smoothing.reordered(x, order), places, ()
        case "qvg":
            return clusters.subtract(x, config, warm, heads_axis)
    return x, None, ()


def _unsmoothed(x: Heads, config: QuantConfig, undo: Any) -> Heads:
    match config.smoothing:
        case "balance":
            return x * undo.astype(jnp.float32)
        case "hadamard":
            return smoothing.hadamard(x)
        case "reorder":
            return smoothing.reordered(x, undo)
        case "qvg":
            return clusters.add(x, undo)
    return x


def _scales(scale: codes.Scale, config: QuantConfig) -> tuple[Array, Array]:
    """The scales that codes are made with, and those that are kept."""
    if config.scale_rounding == "after":
        return scale, codes.to_float8(scale)
    kept = codes.to_float8(scale, jnp.ceil)  # upwards: the group's greatest number must have a code
    return kept.astype(jnp.float32), kept


def store(
    x: Heads, config: QuantConfig, warm: Warm = (), heads_axis: str | None = None
) -> tuple[Stored, Warm]:  # fmt: skip
    """A chunk of keys or values, and what the next one's clusters start from: give it back with the next chunk.

    Pure and of fixed shapes: config is static, and zeros for `warm` are as good as none. Under vmap or shard_map x may
    be some of the heads, the others being along `heads_axis`: what is stored is the same, but for groups of a whole
    tensor, which `config.crosses_heads`. Raises ArgumentError where x cannot be stored so.
    """
    if config.granularity == "auto":
        raise ArgumentError("{granularity} is settled by CacheQuant, or must be given", granularity="auto")
    config.check_width(x.shape[-1])
    smooth, undo, warm = _smoothed(x.astype(jnp.float32), config, warm, heads_axis)
    if config.dtype == "bf16":
        return Stored(codes.to_bfloat16(smooth), None, undo, config, x.shape), warm
    grouped = groups.to_groups(smooth, config.granularity, config.group_size)
    used, kept = _scales(codes.scale_of(grouped, config.dtype), config)
    payload = codes.payload_of(codes.encode(grouped, used, config.dtype), config.dtype)
    return Stored(payload, kept, undo, config, x.shape), warm


def laid_by_token(stored: Stored) -> Stored:
    """The same codes and scales as a kernel reads them: row by row, a token's head after the other.

    payload: [B, S, N, numbers or bytes of a head]. scale: [B, groups of tokens, N, groups of channels]; where each
    channel has its own, those of the first codes of all bytes come first, then those of the second.
    Nothing is padded. Itself where a smoothing has to be undone, or groups or bytes are not of whole tokens.
    """
    config, shape, each = stored.config, stored.shape, codes.codes_a_byte(stored.config.dtype)
    if stored.by_token or not config.plain:
        return stored
    if config.dtype == "bf16":
        return dataclasses.replace(stored, by_token=True)
    grouping = config.granularity, config.group_size
    if shape[-1] % each or (shared := groups.shared_by(shape, *grouping)) is None:
        return stored
    sizes = groups.group_shape(shape, *grouping)
    rows, spread = (
        groups.from_groups(x, shape, config.granularity)
        for x in (codes.codes_of(stored.payload, config.dtype, sizes), jnp.broadcast_to(stored.scale, sizes))
    )
    payload = codes.payload_of(rows, config.dtype).reshape(*shape[:3], -1)
    tokens, channels = shared
    scale = spread[:, ::tokens, :, ::channels]
    if channels == 1:
        scale = rearrange(scale, "b g n (d each) -> b g n (each d)", each=each)
    return Stored(payload, scale, None, config, shape, by_token=True)


def _restored_by_token(stored: Stored) -> Float[Array, "B S N D"]:
    config, shape = stored.config, stored.shape
    tokens, channels = groups.shared_by(shape, config.granularity, config.group_size)
    scale = stored.scale.astype(jnp.float32)
    if channels == 1:
        scale = rearrange(scale, "b g n (each d) -> b g n (d each)", each=codes.codes_a_byte(config.dtype))
    scale = jnp.repeat(jnp.repeat(scale, tokens, axis=1)[:, : shape[1]], channels, axis=3)
    return codes.decode(codes.codes_of(stored.payload, config.dtype, shape), config.dtype) * scale


def restore_float32(stored: Stored) -> Float[Array, "B S N D"]:
    """What was stored, in float32: not yet rounded to what attention reads."""
    config, payload = stored.config, stored.payload
    if config.dtype == "bf16":
        return _unsmoothed(payload.astype(jnp.float32), config, stored.undo)
    if stored.by_token:
        return _restored_by_token(stored)
    shape = groups.group_shape(stored.shape, config.granularity, config.group_size)
    values = codes.decode(codes.codes_of(payload, config.dtype, shape), config.dtype)
    values = values * stored.scale.astype(jnp.float32)
    return _unsmoothed(groups.from_groups(values, stored.shape, config.granularity), config, stored.undo)


def restore(stored: Stored) -> BFloat16[Array, "B S N D"]:
    """What was stored, in bfloat16."""
    return codes.to_bfloat16(restore_float32(stored))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a `Stored`, or of any pytree, abstract ones too."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_a_token(config: QuantConfig, tokens: int, heads: int, width: int) -> float:
    """Bytes that a token of a chunk of so many takes, in one layer, of keys or of values."""
    chunk = jax.ShapeDtypeStruct((1, tokens, heads, width), jnp.bfloat16)
    stored, _ = jax.eval_shape(functools.partial(store, config=config), chunk)
    return nbytes(stored) / tokens
