"""Sizes of networks, read from the shapes of their tensors by Wan2.1's names, and written for other libraries.

Every `*_config(shapes, config, num_heads)` takes the config.json beside the file ({} without one, and it may be of
another network) and, where the caller says so, the number of heads; it raises ValueError for what it cannot tell.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from rcm_jax.wan.config import TAEW2_1, WAN22_VAE, WAN_VAE, CLIPConfig, DiTConfig, TinyVAEConfig, UMT5Config, VAEConfig

Shapes = Mapping[str, tuple[int, ...]]
DIT_HEAD_DIM, CLIP_HEAD_DIM = 128, 80  # of the published networks; shapes do not tell them


def need(shapes: Shapes, name: str, *ranks: int) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from, which has one of these numbers of axes and none that is empty."""
    if name not in shapes:
        raise ValueError(f"weights do not fit the network: {name}, which its size is read from, is missing")
    shape = shapes[name]
    if 0 in shape or not shape or (ranks and len(shape) not in ranks):
        raise ValueError(f"weights do not fit the network: {name} has shape {shape}, from which no size can be read")
    return shape


def count_layers(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number at `{i}` in the names."""
    rule = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
    return 1 + max((int(found[1]) for found in map(rule.match, shapes) if found), default=-1)


def count_heads(dim: int, told: int | None, head_dim: int) -> int:
    heads = told or dim / head_dim
    if heads < 1 or dim % heads:
        raise ValueError(f"{dim=} does not divide into {heads:g} heads; say how many there are with --num_heads")
    return int(heads)


def dit_config(shapes: Shapes, config: Mapping[str, Any], num_heads: int | None) -> DiTConfig:
    patch = need(shapes, "patch_embedding.weight", 2, 5)
    patch_size = patch[2:] if len(patch) == 5 else (1, 2, 2)
    numbers = math.prod(patch_size)
    if str(config.get("_class_name")).startswith("Wan"):  # WanModel or WanTransformer3DModel
        told = config.get("num_heads") or config.get("num_attention_heads")
        if num_heads and told and num_heads != told:
            raise ValueError(f"num_heads={num_heads} is asked for, and the config.json beside the file says {told}")
        num_heads = num_heads or told
    taken = patch[1] if len(patch) == 5 else patch[1] // numbers
    made = need(shapes, "head.head.weight", 2)[0] // numbers
    return DiTConfig(
        dim=patch[0],
        ffn_dim=need(shapes, "blocks.0.ffn.0.weight", 2)[0],
        num_heads=count_heads(patch[0], num_heads, DIT_HEAD_DIM),
        num_layers=count_layers(shapes, "blocks.{i}."),
        in_channels=taken,
        out_channels=made,
        patch_size=patch_size,
        freq_dim=need(shapes, "time_embedding.0.weight", 2)[1],
        text_dim=need(shapes, "text_embedding.0.weight", 2)[1],
        image_dim=need(shapes, "img_emb.proj.1.weight", 2)[1] if "img_emb.proj.1.weight" in shapes else None,
        image_first=taken == made and (made == WAN22_VAE.z_dim or config.get("model_type") == "ti2v"),
        dtype="bfloat16",
    )


def dit_library(c: DiTConfig) -> dict[str, Any]:
    """The config.json of diffusers' WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(c.patch_size),
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.head_dim,
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "text_dim": c.text_dim,
        "freq_dim": c.freq_dim,
        "ffn_dim": c.ffn_dim,
        "num_layers": c.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": c.eps,
        "image_dim": c.image_dim,
        "added_kv_proj_dim": None if c.image_dim is None else c.dim,
        "rope_max_seq_len": 1024,
    }


def vae_config(shapes: Shapes, config: Mapping[str, Any], num_heads: int | None) -> VAEConfig:
    """Latents are normalised as config.json says; without one as Wan2.1's or Wan2.2's are, by their channels, or not at
    all where they are not 16 or 48."""
    dim, pixels = need(shapes, "encoder.conv1.weight", 5)[:2]
    patch_size, z_dim = math.isqrt(pixels // 3), need(shapes, "conv2.weight", 5)[0]
    if pixels != 3 * patch_size**2:
        raise ValueError(f"weights do not fit the network: encoder.conv1 takes {pixels} channels, no square of colours")
    residual = any(name.startswith("encoder.downsamples.0.downsamples.") for name in shapes)
    mult, blocks, temporal = (_levels if residual else _row_of_levels)(shapes, dim)
    if len(set(blocks)) > 1 or len(mult) != len(temporal) + 1:
        raise ValueError(
            f"weights do not fit the network: its levels have {blocks} blocks, and {len(temporal)} halvings"
        )
    known = {c.z_dim: (c.mean, c.std) for c in (WAN_VAE, WAN22_VAE)}
    mean, std = known.get(z_dim, ((0.0,) * z_dim, (1.0,) * z_dim))
    if config.get("_class_name") == "AutoencoderKLWan" and "latents_mean" in config:
        mean, std = config["latents_mean"], config["latents_std"]
    decoder = need(shapes, "decoder.conv1.weight", 5)[0]
    if decoder % mult[-1]:
        raise ValueError(f"weights do not fit the network: decoder.conv1 is {decoder} wide, no multiple of {mult[-1]}")
    return VAEConfig(
        dim, z_dim, tuple(mult), blocks[0], tuple(temporal), decoder_dim=decoder // mult[-1], patch_size=patch_size,
        residual=residual, mean=tuple(mean), std=tuple(std),
    )  # fmt: skip


Levels = tuple[list[int], list[int], list[bool]]  # widths in dim, blocks, and which halvings halve time


def _row_of_levels(shapes: Shapes, dim: int) -> Levels:
    """Of Wan2.1's encoder, whose blocks and halvings have one row of numbers."""
    need(shapes, "encoder.downsamples.0.residual.2.weight")
    mult, blocks, temporal = [], [], []
    for i in range(count_layers(shapes, "encoder.downsamples.{i}.")):
        name = f"encoder.downsamples.{i}"
        if f"{name}.resample.1.weight" in shapes:
            temporal.append(f"{name}.time_conv.weight" in shapes)
        else:
            if len(mult) == len(temporal):
                mult.append(0)
                blocks.append(0)
            mult[-1] = _multiple(shapes, name, dim)
            blocks[-1] += 1
    return mult, blocks, temporal


def _levels(shapes: Shapes, dim: int) -> Levels:
    """Of Wan2.2's, level by level."""
    mult, blocks, temporal = [], [], []
    for i in range(count_layers(shapes, "encoder.downsamples.{i}.")):
        level = f"encoder.downsamples.{i}.downsamples"
        mult.append(_multiple(shapes, f"{level}.0", dim))
        last = count_layers(shapes, f"{level}.{{i}}.") - 1
        halves = f"{level}.{last}.resample.1.weight" in shapes
        blocks.append(last if halves else last + 1)
        temporal += [f"{level}.{last}.time_conv.weight" in shapes] * halves
    return mult, blocks, temporal


def _multiple(shapes: Shapes, block: str, dim: int) -> int:
    width = need(shapes, f"{block}.residual.2.weight", 5)[0]
    if width % dim:
        raise ValueError(
            f"weights do not fit the network: {block} is {width} wide, no multiple of encoder.conv1's {dim}"
        )
    return width // dim


def vae_library(c: VAEConfig) -> dict[str, Any]:
    """The config.json of diffusers' AutoencoderKLWan."""
    if c.num_res_blocks != WAN_VAE.num_res_blocks:
        raise ValueError(
            f"diffusers' names are known for {WAN_VAE.num_res_blocks} blocks a level, not {c.num_res_blocks}"
        )
    colours = 3 * c.patch_size**2
    of_wan22 = {
        "decoder_base_dim": c.width["decoder"],
        "is_residual": c.residual,
        "in_channels": colours,
        "out_channels": colours,
        "patch_size": None if c.patch_size == 1 else c.patch_size,
        "scale_factor_temporal": c.time,
        "scale_factor_spatial": c.space,
    }
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": c.dim,
        "z_dim": c.z_dim,
        "dim_mult": list(c.dim_mult),
        "num_res_blocks": c.num_res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(c.temporal_downsample),
        "dropout": 0.0,
        "latents_mean": list(c.mean),
        "latents_std": list(c.std),
    } | (of_wan22 if c.residual or c.patch_size > 1 or c.decoder_dim else {})


def tiny_vae_config(shapes: Shapes, config: Mapping[str, Any], num_heads: int | None) -> TinyVAEConfig:
    """Of TAEW2.1's form: what its levels do with time, shapes do not tell."""
    width, z_dim = need(shapes, "decoder.1.weight", 4)[:2]
    spaces = [f"decoder.{8 + 6 * i}.weight" for i in range(len(TAEW2_1.decoder_time))]
    widths = (width, *(need(shapes, name)[0] for name in spaces))
    return TinyVAEConfig(widths, need(shapes, "encoder.0.weight")[0], z_dim)


def umt5_config(shapes: Shapes, config: Mapping[str, Any], num_heads: int | None) -> UMT5Config:
    vocabulary, dim = need(shapes, "token_embedding.weight", 2)
    buckets, heads = need(shapes, "blocks.0.pos_embedding.embedding.weight", 2)
    return UMT5Config(
        vocabulary=vocabulary,
        dim=dim,
        attention_dim=need(shapes, "blocks.0.attn.q.weight", 2)[0],
        ffn_dim=need(shapes, "blocks.0.ffn.fc1.weight", 2)[0],
        num_heads=heads,
        num_layers=count_layers(shapes, "blocks.{i}."),
        buckets=buckets,
        max_distance=config.get("relative_attention_max_distance", 128) if config.get("model_type") == "umt5" else 128,
        dtype="bfloat16",
    )


def umt5_library(c: UMT5Config) -> dict[str, Any]:
    """The config.json of transformers' UMT5EncoderModel."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": c.vocabulary,
        "d_model": c.dim,
        "d_kv": c.attention_dim // c.num_heads,
        "d_ff": c.ffn_dim,
        "num_layers": c.num_layers,
        "num_heads": c.num_heads,
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance,
        "layer_norm_epsilon": c.eps,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def clip_config(shapes: Shapes, config: Mapping[str, Any], num_heads: int | None) -> CLIPConfig:
    """Without the file's last block, which Wan does not use."""
    dim, _, patch_size, _ = need(shapes, "visual.patch_embedding.weight", 4)
    tokens = need(shapes, "visual.pos_embedding", 2, 3)[-2]
    if config.get("model_type") == "clip_vision_model":
        num_heads = num_heads or config.get("num_attention_heads")
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"its activation is {config['hidden_act']}; the tower that Wan uses has gelu")
    return CLIPConfig(
        dim=dim,
        num_heads=count_heads(dim, num_heads, CLIP_HEAD_DIM),
        num_layers=count_layers(shapes, "visual.transformer.{i}.") - 1,
        image_size=math.isqrt(tokens - 1) * patch_size,
        patch_size=patch_size,
        mlp_ratio=need(shapes, "visual.transformer.0.mlp.0.weight", 2)[0] // dim,
    )


def clip_library(c: CLIPConfig) -> dict[str, Any]:
    """The config.json of transformers' CLIPVisionModel, with the block that we do not compute."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": c.dim,
        "intermediate_size": c.mlp_ratio * c.dim,
        "num_hidden_layers": c.num_layers + 1,
        "num_attention_heads": c.num_heads,
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": c.eps,
    }
