"""Golden checks of what surrounds the DiT: autoencoder, text encoder, CLIP's image tower and its preprocessing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.convert import clip as clip_table
from rcm_jax.convert import umt5 as umt5_table
from rcm_jax.convert import vae as vae_table
from rcm_jax.wan.clip import CLIP, preprocess
from rcm_jax.wan.config import CLIPConfig, UMT5Config, VAEConfig
from rcm_jax.wan.umt5 import UMT5, relative_buckets
from rcm_jax.wan.vae import VAE
from tests import golden_networks
from tests.golden_common import Case, Check, channels_first, channels_last


def vae(case: Case) -> list[Check]:
    c = case.config
    sizes = dict(dim=c["dim"], z_dim=c["z_dim"], dim_mult=c["dim_mult"], num_res_blocks=c["num_res_blocks"])
    if "dec_dim" in c:  # Wan2.2's
        sizes |= dict(decoder_dim=c["dec_dim"], patch_size=c["patch_size"], residual=True)
    config = VAEConfig(
        **sizes, temporal_downsample=c["temperal_downsample"], attention=golden_networks.ATTENTION, **_scale(case)
    )
    net, params = VAE(config), vae_table.from_wan(case.weights, config)
    latent = net.encode(params, channels_last(case.inputs["video"]))
    decoded = net.decode(params, latent)
    got = {
        "latent": latent,
        "decoded": decoded,
        "decoded_clamped": jnp.clip(decoded, -1, 1),
        "decoded_extra": net.decode(params, channels_last(case.inputs["z_extra"])),
    }
    return [Check(k, channels_first(v), case.outputs[k], rel=3e-5, max_abs=1e-4) for k, v in got.items()]


def _scale(case: Case) -> dict:
    """The published normalisation is the config's default; a case that uses it must have those numbers."""
    z = case.config["z_dim"]
    if case.config["scale"] == "none":
        return dict(mean=(0.0,) * z, std=(1.0,) * z)
    for name in ("mean", "std"):
        np.testing.assert_array_equal(case.inputs[name], np.float32(getattr(VAEConfig(), name)))
    return {}


def umt5(case: Case) -> list[Check]:
    c = case.config
    config = UMT5Config(
        vocabulary=c["vocab"], dim=c["dim"], attention_dim=c["dim_attn"], ffn_dim=c["dim_ffn"],
        num_heads=c["num_heads"], num_layers=c["num_layers"], buckets=c["num_buckets"],
    )  # fmt: skip
    variables = {"params": umt5_table.from_wan(case.weights, config)}
    inputs = case.inputs["ids"], case.inputs["mask"]
    buckets = relative_buckets(c["seq_len"], config.buckets, config.max_distance)
    limits = dict(rel=8e-6, max_abs=5e-5)
    want = case.outputs
    return [
        Check("hidden", UMT5(config).apply(variables, *inputs, method="hidden"), want["hidden"], **limits),
        Check("hidden_zero_padded", UMT5(config).apply(variables, *inputs), want["hidden_zero_padded"], **limits),
        Check("rel_buckets_row_first", buckets[0], want["rel_buckets_row_first"], exact=True),
        Check("rel_buckets_row_last", buckets[-1], want["rel_buckets_row_last"], exact=True),
    ]


def clip_visual(case: Case) -> list[Check]:
    c = case.config
    config = CLIPConfig(
        dim=c["dim"], num_heads=c["num_heads"], num_layers=c["num_layers"], image_size=c["image_size"],
        patch_size=c["patch_size"], mlp_ratio=c["mlp_ratio"], attention=golden_networks.ATTENTION,
    )  # fmt: skip
    image = np.moveaxis(case.inputs["image"], 1, -1)

    def check(name: str, config: CLIPConfig) -> Check:
        tokens = CLIP(config).apply({"params": clip_table.from_wan(case.weights, config)}, image)
        return Check(name, tokens, case.outputs[name], rel=1e-5, max_abs=1e-4)

    before_last = dataclasses.replace(config, num_layers=config.num_layers - 1)
    return [check("tokens_last", config), check("tokens_penultimate", before_last)]


def clip_preprocess(case: Case) -> list[Check]:
    image = jnp.asarray(case.inputs["video"][:, 0].transpose(1, 2, 0)[None])
    pixels = jax.jit(preprocess, static_argnums=1)(image, case.config["image_size"])
    return [Check("pixels", pixels.transpose(0, 3, 1, 2), case.outputs["pixels"], rel=3e-5, max_abs=1e-4)]


CASES = {"vae": vae, "umt5": umt5, "clip_visual": clip_visual, "clip_preprocess": clip_preprocess}
