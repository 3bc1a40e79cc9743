"""Wan2.1's DiT weight names, and ours: one row a tensor.

Every row maps a PyTorch name to a path in our parameter tree and says how the array is laid out. Names with
`blocks.{i}` are read for every layer and stacked on a leading axis.
"""

import numpy as np
from einops import rearrange

from rcm_jax.convert.table import Layout, Row, Tensors, to_ours, to_theirs
from rcm_jax.wan.config import DiTConfig


def _linear(theirs: str, ours: str) -> list[Row]:
    return [Row(f"{theirs}.weight", f"{ours}/kernel", "transpose"), Row(f"{theirs}.bias", f"{ours}/bias")]


def _attention(name: str) -> list[Row]:
    rows = [row for part in "qkvo" for row in _linear(f"blocks.{{i}}.{name}.{part}", f"blocks/{name}/{part}")]
    norms = [Row(f"blocks.{{i}}.{name}.norm_{part}.weight", f"blocks/{name}/norm_{part}/scale") for part in "qk"]
    return rows + norms


def _norm(theirs: str, ours: str) -> list[Row]:
    return [Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")]


def _image() -> list[Row]:
    """What a network with CLIP tokens has besides."""
    return [
        *_norm("img_emb.proj.0", "image_norm_in"),
        *_linear("img_emb.proj.1", "image_in"),
        *_linear("img_emb.proj.3", "image_out"),
        *_norm("img_emb.proj.4", "image_norm_out"),
        *_linear("blocks.{i}.cross_attn.k_img", "blocks/cross_attn/k_img"),
        *_linear("blocks.{i}.cross_attn.v_img", "blocks/cross_attn/v_img"),
        Row("blocks.{i}.cross_attn.norm_k_img.weight", "blocks/cross_attn/norm_k_img/scale"),
    ]


def rows(config: DiTConfig) -> list[Row]:
    """The whole network."""
    return [
        Row("patch_embedding.weight", "patch_embedding/kernel", "patch"),
        Row("patch_embedding.bias", "patch_embedding/bias"),
        *_linear("text_embedding.0", "text_in"),
        *_linear("text_embedding.2", "text_out"),
        *_linear("time_embedding.0", "time_in"),
        *_linear("time_embedding.2", "time_out"),
        *_linear("time_projection.1", "time_projection"),
        Row("blocks.{i}.modulation", "blocks/modulation", "squeeze"),
        *_attention("self_attn"),
        *_attention("cross_attn"),
        *_norm("blocks.{i}.norm3", "blocks/norm3"),
        *_linear("blocks.{i}.ffn.0", "blocks/ffn_in"),
        *_linear("blocks.{i}.ffn.2", "blocks/ffn_out"),
        Row("head.modulation", "head/modulation", "squeeze"),
        *_linear("head.head", "head/out"),
        *(_image() if config.image_dim is not None else []),
    ]


def linears(config: DiTConfig) -> dict[str, str]:
    """The linear layers, {Wan2.1's name: ours}; those of blocks with `{i}` for the number."""
    whole = [row for row in rows(config) if row.layout == "transpose"]
    return {row.theirs.removesuffix(".weight"): row.ours.removesuffix("/kernel") for row in whole}


def layouts(config: DiTConfig) -> dict[str, Layout]:
    """The changes of layout that `rows` names and `table.LAYOUTS` lacks."""

    def patch_to_ours(weight: np.ndarray) -> np.ndarray:
        # Conv3d [dim, c, p_t, p_h, p_w], or the Linear [dim, c·p_t·p_h·p_w] of the rCM files
        weight = weight.reshape(weight.shape[0], config.in_channels, *config.patch_size)
        return rearrange(weight, "d c pt ph pw -> (pt ph pw c) d")

    def patch_to_wan(kernel: np.ndarray) -> np.ndarray:
        pt, ph, pw = config.patch_size
        return rearrange(kernel, "(pt ph pw c) d -> d c pt ph pw", pt=pt, ph=ph, pw=pw)

    return {"patch": (patch_to_ours, patch_to_wan)}


def from_wan(tensors: Tensors, config: DiTConfig) -> dict:
    """Wan2.1-named arrays to the parameter tree of `wan.dit.DiT`. Raises ValueError listing what does not fit."""
    return to_ours(rows(config), tensors, config.num_layers, layouts(config))


def to_wan(params: dict, config: DiTConfig) -> dict[str, np.ndarray]:
    """The parameter tree back to Wan2.1's names and layouts (patch embedding as Conv3d)."""
    return to_theirs(rows(config), params, config.num_layers, layouts(config))
