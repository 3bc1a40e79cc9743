"""The weight names of Wan2.1's umT5 encoder, and ours: one row a tensor."""

import numpy as np

from rcm_jax.convert.table import Layout, Row, Tensors, to_ours, to_theirs
from rcm_jax.wan.config import UMT5Config

LINEAR = {f"attn.{n}": n for n in "qkvo"} | {"ffn.gate.0": "ffn_gate", "ffn.fc1": "ffn_in", "ffn.fc2": "ffn_out"}


def rows(config: UMT5Config) -> list[Row]:
    """The whole encoder."""
    return [
        Row("token_embedding.weight", "token_embedding"),
        Row("blocks.{i}.norm1.weight", "blocks/norm_attention/scale"),
        Row("blocks.{i}.norm2.weight", "blocks/norm_ffn/scale"),
        Row("blocks.{i}.pos_embedding.embedding.weight", "blocks/position"),
        *(
            Row(f"blocks.{{i}}.{theirs}.weight", f"blocks/{ours}/kernel", "transpose")
            for theirs, ours in LINEAR.items()
        ),
        Row("norm.weight", "norm/scale"),
    ]


def layouts(config: UMT5Config) -> dict[str, Layout]:
    """The changes of layout that `rows` names and `table.LAYOUTS` lacks: none."""
    return {}


def from_wan(tensors: Tensors, config: UMT5Config) -> dict:
    """Wan2.1-named arrays to the parameters of `wan.umt5.UMT5`. Raises ValueError listing what does not fit."""
    return to_ours(rows(config), tensors, config.num_layers, layouts(config))


def to_wan(params: dict, config: UMT5Config) -> dict[str, np.ndarray]:
    """The parameters back to Wan2.1's names and layouts."""
    return to_theirs(rows(config), params, config.num_layers, layouts(config))
