"""The weight names of TAEW2.1, the tiny autoencoder, and ours: one row a tensor."""

from collections.abc import Callable, Sequence

import numpy as np

from rcm_jax.convert.table import Layout, Row, Tensors, pattern, to_ours, to_theirs
from rcm_jax.wan.config import TinyVAEConfig
from rcm_jax.wan.tiny_vae import BLOCKS

HALVES = ("encoder", "decoder")


def _conv(theirs: str, ours: str, bias: bool = True) -> list[Row]:
    kernel = Row(f"{theirs}.weight", f"{ours}/kernel", "conv2")
    return [kernel, Row(f"{theirs}.bias", f"{ours}/bias")] if bias else [kernel]


def _blocks(half: str, first: int, level: int) -> list[Row]:
    """Their layers 0, 2 and 4 of a block are convolutions."""
    return [
        row
        for j in range(BLOCKS)
        for k in range(3)
        for row in _conv(f"{half}.{first + j}.conv.{2 * k}", f"{half}/level_{level}_block_{j}/conv_{k}")
    ]


def _encoder(levels: int) -> list[Row]:
    """They number through: a level is its change of time, its halving, and its blocks."""
    out = _conv("encoder.0", "encoder/conv_in")
    for i in range(levels):
        first, ours = 2 + (2 + BLOCKS) * i, f"encoder/level_{i}"
        out += [Row(f"encoder.{first}.conv.weight", f"{ours}_time/kernel", "point2")]
        out += _conv(f"encoder.{first + 1}", f"{ours}_space", bias=False) + _blocks("encoder", first + 2, i)
    return out + _conv(f"encoder.{2 + (2 + BLOCKS) * levels}", "encoder/conv_out")


def _decoder(levels: int) -> list[Row]:
    """A level is its blocks, a doubling without weights, its change of time, and a convolution."""
    out = _conv("decoder.1", "decoder/conv_in")
    for i in range(levels):
        first, ours = 3 + (3 + BLOCKS) * i, f"decoder/level_{i}"
        out += _blocks("decoder", first, i)
        out += [Row(f"decoder.{first + BLOCKS + 1}.conv.weight", f"{ours}_time/kernel", f"time_{i}")]
        out += _conv(f"decoder.{first + BLOCKS + 2}", f"{ours}_space/conv", bias=False)
    return out + _conv(f"decoder.{4 + (3 + BLOCKS) * levels}", "decoder/conv_out")


def rows(config: TinyVAEConfig, halves: Sequence[str] = HALVES) -> list[Row]:
    """The whole autoencoder, or one of its halves."""
    tables = {"encoder": _encoder, "decoder": _decoder}
    return [row for half in halves for row in tables[half](len(config.decoder_time))]


def layouts(config: TinyVAEConfig) -> dict[str, Layout]:
    """The changes of layout that `rows` names and `table.LAYOUTS` lacks."""
    widths = zip(config.decoder_widths, config.decoder_time, strict=False)
    times = {f"time_{i}": (_last_rows(width, frames), POINT[1]) for i, (width, frames) in enumerate(widths)}
    return {"conv2": pattern("o i h w", "h w i o"), "point2": POINT} | times


POINT = pattern("o i 1 1", "i o")


def _last_rows(width: int, frames: int) -> Callable[[np.ndarray], np.ndarray]:
    """Of a layer that makes more frames of one than ours does: it is published so, and the last frames are ours."""

    def layout(x: np.ndarray) -> np.ndarray:
        kernel = POINT[0](x)
        if kernel.shape[-1] % width:
            raise ValueError(f"its rows are no multiple of the {width} channels of a frame")
        return kernel[:, -width * frames :]

    return layout


def from_wan(tensors: Tensors, config: TinyVAEConfig, halves: Sequence[str] = HALVES) -> dict:
    """Arrays by TAEW2.1's names to the parameters of `wan.tiny_vae.TinyVAE`. Raises ValueError listing what does not
    fit."""
    return to_ours(rows(config, halves), tensors, 0, layouts(config))


def to_wan(params: dict, config: TinyVAEConfig, halves: Sequence[str] = HALVES) -> dict[str, np.ndarray]:
    """The parameters back to TAEW2.1's names and layouts."""
    return to_theirs(rows(config, halves), params, 0, layouts(config))
