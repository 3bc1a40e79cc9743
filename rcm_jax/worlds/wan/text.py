"""umT5 one layer at a time, read from its file: the 11 GB are never in memory together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from rcm_jax.convert.checkpoint import Checkpoint
from rcm_jax.convert.networks import with_dtype
from rcm_jax.finite import check_finite
from rcm_jax.types import Params
from rcm_jax.wan.layers import RMSNorm
from rcm_jax.wan.umt5 import Block, relative_buckets

STEP = 128  # prompts are padded to a multiple of it: few programs, and short prompts are cheap


@functools.partial(jax.jit, static_argnames="block")
def _apply(block: Block, params: Params, x: Array, mask: Array, buckets: Array) -> Array:
    return block.apply({"params": params}, x, mask, buckets)[0]


def encode_prompts(
    source: Checkpoint, ids: Int[np.ndarray, "P L"], masks: Int[np.ndarray, "P L"], *, dtype: str
) -> Float[np.ndarray, "P L D"]:
    """What `wan.umt5.UMT5` gives, computed in `dtype`, zeros after each prompt. Every prompt is a batch of its own, so
    its numbers do not depend on the others."""
    config = dataclasses.replace(source.config, dtype=dtype)
    flat = with_dtype(source.ours(), dtype, source.network)
    table = flat["token_embedding"].load()
    layers = {name.removeprefix("blocks/"): t for name, t in flat.items() if name.startswith("blocks/")}
    lengths = [min(len(mask), -(-int(mask.sum()) // STEP) * STEP) for mask in masks]
    xs = [jnp.asarray(table[row[:n]][None], dtype) for row, n in zip(ids, lengths, strict=True)]
    seen = [jnp.asarray(mask[None, :n]) for mask, n in zip(masks, lengths, strict=True)]
    buckets = [jnp.asarray(relative_buckets(n, config.buckets, config.max_distance)) for n in lengths]
    for i in tqdm(range(config.num_layers), "text", unit="layer", delay=2, leave=False):
        weights = {k: check_finite(t.layer(i).read(), f"{source.path}, {k}, layer {i}") for k, t in layers.items()}
        params = unflatten_dict(jax.device_put(weights), sep="/")
        operands = zip(xs, seen, buckets, strict=True)
        xs = jax.block_until_ready([_apply(Block(config), params, *operand) for operand in operands])
    scale = {"params": {"scale": jnp.asarray(flat["norm/scale"].read())}}
    out = np.zeros((*ids.shape, config.dim), jnp.dtype(dtype))
    for row, x, mask in zip(out, xs, masks, strict=True):
        prompt = int(mask.sum())
        row[:prompt] = np.asarray(RMSNorm(config.eps).apply(scale, x))[0, :prompt]
    return out
