"""The weight names of Wan2.1's CLIP file, and ours: one row a tensor, and what is not computed with."""

import numpy as np

from rcm_jax.convert.table import Layout, Row, Tensors, pattern, to_ours, to_theirs
from rcm_jax.wan.config import CLIPConfig

LINEAR = {"attn.to_qkv": "qkv", "attn.proj": "o", "mlp.0": "mlp_in", "mlp.2": "mlp_out"}
TOWER = "visual."  # the image tower's names
LAYOUTS: dict[str, Layout] = {
    "conv2": pattern("o i h w", "h w i o"),
    "token": pattern("1 1 d", "d"),
}


def rows(config: CLIPConfig) -> list[Row]:
    """The image tower up to the tokens that Wan takes."""
    block = "visual.transformer.{i}"
    out = [
        Row("visual.patch_embedding.weight", "patch_embedding/kernel", "conv2"),
        Row("visual.cls_embedding", "class_token", "token"),
        Row("visual.pos_embedding", "position", "squeeze"),
    ]
    for theirs, ours in LINEAR.items():
        out.append(Row(f"{block}.{theirs}.weight", f"blocks/{ours}/kernel", "transpose"))
        out.append(Row(f"{block}.{theirs}.bias", f"blocks/{ours}/bias"))
    norms = {
        f"{block}.norm1": "blocks/norm_attention",
        f"{block}.norm2": "blocks/norm_mlp",
        "visual.pre_norm": "norm_in",
    }
    for theirs, ours in norms.items():
        out += [Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")]
    return out


def dropped(config: CLIPConfig) -> tuple[str, ...]:
    """Beginnings of the names that a file may have besides, and Wan does not use: in the image tower what comes after
    the tokens (one block, norm, projection), and the text tower."""
    tail = (f"visual.transformer.{config.num_layers}.", "visual.post_norm.", "visual.head")
    return (*tail, "textual.", "log_scale")


def tail(config: CLIPConfig) -> list[str]:
    """Of these, the end of the image tower: without it the tower is not whole."""
    block = f"visual.transformer.{config.num_layers}"
    layers = [*(f"{block}.{layer}" for layer in (*LINEAR, "norm1", "norm2")), "visual.post_norm"]
    return [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]


def layouts(config: CLIPConfig) -> dict[str, Layout]:
    """The changes of layout that `rows` names and `table.LAYOUTS` lacks."""
    return LAYOUTS


def from_wan(tensors: Tensors, config: CLIPConfig) -> dict:
    """Wan2.1-named arrays to the parameters of `wan.clip.CLIP`. Raises ValueError listing what does not fit."""
    used = {name: tensors[name] for name in tensors if not name.startswith(dropped(config))}
    return to_ours(rows(config), used, config.num_layers, layouts(config))


def to_wan(params: dict, config: CLIPConfig) -> dict[str, np.ndarray]:
    """The parameters back to Wan2.1's names and layouts; what was dropped is not in it."""
    return to_theirs(rows(config), params, config.num_layers, layouts(config))
