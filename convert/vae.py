"""The weight names of Wan2.1's and Wan2.2's video autoencoders, and ours: one row a tensor."""

import itertools

import numpy as np

from rcm_jax.convert.table import Layout, Row, Tensors, pattern, to_ours, to_theirs
from rcm_jax.wan.config import VAEConfig

# their layers of these kinds are convolutions, or scales of images, with as many axes as the arrays they are applied to
LAYOUTS: dict[str, Layout] = {
    "conv3": pattern("o i f h w", "f h w i o"),
    "conv2": pattern("o i h w", "h w i o"),
    "point3": pattern("o i 1 1 1", "i o"),
    "point2": pattern("o i 1 1", "i o"),
    "scale3": pattern("c 1 1 1", "c"),
    "scale2": pattern("c 1 1", "c"),
}


def _layer(theirs: str, ours: str, layout: str) -> list[Row]:
    return [Row(f"{theirs}.weight", f"{ours}/kernel", layout), Row(f"{theirs}.bias", f"{ours}/bias")]


def _block(theirs: str, ours: str, shortcut: bool = False) -> list[Row]:
    return [
        Row(f"{theirs}.residual.0.gamma", f"{ours}/norm_in/scale", "scale3"),
        *_layer(f"{theirs}.residual.2", f"{ours}/conv_in/conv", "conv3"),
        Row(f"{theirs}.residual.3.gamma", f"{ours}/norm_out/scale", "scale3"),
        *_layer(f"{theirs}.residual.6", f"{ours}/conv_out/conv", "conv3"),
        *(_layer(f"{theirs}.shortcut", f"{ours}/shortcut", "point3") if shortcut else []),
    ]


def _ends(half: str) -> list[Row]:
    """What encoder and decoder share: first and last convolution and the middle."""
    return [
        *_layer(f"{half}.conv1", f"{half}/conv_in/conv", "conv3"),
        *_block(f"{half}.middle.0", f"{half}/middle/block_in"),
        Row(f"{half}.middle.1.norm.gamma", f"{half}/middle/attention/norm/scale", "scale2"),
        *_layer(f"{half}.middle.1.to_qkv", f"{half}/middle/attention/qkv", "point2"),
        *_layer(f"{half}.middle.1.proj", f"{half}/middle/attention/out", "point2"),
        *_block(f"{half}.middle.2", f"{half}/middle/block_out"),
        Row(f"{half}.head.0.gamma", f"{half}/norm_out/scale", "scale3"),
        *_layer(f"{half}.head.2", f"{half}/conv_out/conv", "conv3"),
    ]


def _levels(
    half: str, theirs: str, resample: str, mults: tuple[float, ...], blocks: int, temporal: tuple[bool, ...],
    residual: bool,
) -> list[Row]:  # fmt: skip
    """Residual blocks and resampling: in Wan2.1 numbered through, two or three blocks, a resampling, and so on; level
    by level in a `residual` network. mults: of the first convolution, then of each level."""
    out, index = [], 0
    for i, (before, mult) in enumerate(itertools.pairwise(mults)):
        name = f"{half}.{theirs}.{i}.{theirs}" if residual else f"{half}.{theirs}"
        index = 0 if residual else index
        for j in range(blocks):
            # a resampling of Wan2.1's decoder halves the channels, so that a level starts with half its predecessor's
            into = (before if residual or half == "encoder" or i == 0 else before / 2) if j == 0 else mult
            out += _block(f"{name}.{index}", f"{half}/level_{i}_block_{j}", shortcut=into != mult)
            index += 1
        if i < len(temporal):
            ours = f"{half}/level_{i}_{resample}"
            out += _layer(f"{name}.{index}.resample.1", f"{ours}/space", "conv2")
            out += _layer(f"{name}.{index}.time_conv", f"{ours}/time", "conv3") if temporal[i] else []
            index += 1
    return out


def rows(config: VAEConfig) -> list[Row]:
    """The whole autoencoder."""
    c = config
    down, up = c.temporal_downsample, c.temporal_downsample[::-1]
    widening, narrowing = (1, *c.dim_mult), (c.dim_mult[-1], *c.dim_mult[::-1])
    return [
        *_ends("encoder"),
        *_levels("encoder", "downsamples", "down", widening, c.num_res_blocks, down, c.residual),
        *_layer("conv1", "encoder/moments", "point3"),
        *_layer("conv2", "decoder/latents", "point3"),
        *_ends("decoder"),
        *_levels("decoder", "upsamples", "up", narrowing, c.num_res_blocks + 1, up, c.residual),
    ]


def layouts(config: VAEConfig) -> dict[str, Layout]:
    """The changes of layout that `rows` names and `table.LAYOUTS` lacks."""
    return LAYOUTS


def from_wan(tensors: Tensors, config: VAEConfig) -> dict:
    """Wan2.1-named arrays to the parameters of `wan.vae.VAE`. Raises ValueError listing what does not fit."""
    return to_ours(rows(config), tensors, 0, layouts(config))


def to_wan(params: dict, config: VAEConfig) -> dict[str, np.ndarray]:
    """The parameters back to Wan2.1's names and layouts."""
    return to_theirs(rows(config), params, 0, layouts(config))
