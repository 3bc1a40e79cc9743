"""Wan2.1's 1.3B with random weights, through the pipeline's own door: what streaming and sampling are timed with."""

import dataclasses
import types
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rcm_jax.convert.networks import NETWORKS
from rcm_jax.model_file import ModelInfo
from rcm_jax.parallel import leaf_path, make_mesh, shard
from rcm_jax.pipelines.networks import Experts
from rcm_jax.pipelines.opening import Opened
from rcm_jax.pipelines.options import FileOptions
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.sampling.stream import Decode
from rcm_jax.types import Params
from rcm_jax.wan.config import WAN_1_3B, WAN_VAE, DiTConfig, VAEConfig
from rcm_jax.wan.networks import abstract_network
from rcm_jax.worlds.wan.files import WanFiles
from rcm_jax.worlds.wan.world import WanWorld
from rcm_jax.worlds.world import Size

TINY = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=24, text_len=8)
TINY_VAE = dict(dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,))


def model(tiny: bool) -> DiTConfig:
    """Computes in bfloat16, nothing recomputed: as it is sampled."""
    return dataclasses.replace(WAN_1_3B, remat=False, **(TINY if tiny else {}))


def vae(tiny: bool) -> VAEConfig:
    return dataclasses.replace(WAN_VAE, dtype="bfloat16", **(TINY_VAE if tiny else {}))


def random_weights(config: Any, name: str) -> Params:
    """Small enough for activations to stay finite; what a converted file keeps in float32 is float32."""
    exact = next(n.full_precision for n in NETWORKS if n.name == name)

    def leaf(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        path = leaf_path(path)
        dtype = "float32" if exact.search(path) else config.dtype
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32(path.encode()))
        return (0.02 * jax.random.normal(key, x.shape) + path.endswith("scale")).astype(dtype)

    return jax.jit(lambda: jax.tree_util.tree_map_with_path(leaf, abstract_network(config)))()


class RandomWorld(WanWorld):
    """Wan's world without files: random features for every prompt, an autoencoder of random weights.

    decodes: without it frames are the latents, and the autoencoder is not in a stream's times.
    """

    small = True  # no estimate of memory from files, which are not there

    def __init__(self, config: DiTConfig, autoencoder: VAEConfig, size: Size, *, decodes: bool = True):
        one = types.SimpleNamespace
        files = WanFiles((one(config=config),), one(config=autoencoder), text=None, tokenizer=None, clip=None)
        super().__init__(files, dtype=config.dtype, vae_dtype=autoencoder.dtype)
        self._config, self._size, self._decodes = config, size, decodes
        self.usual_frames = None  # as many as the network's latents are
        self._vae_params = shard(random_weights(autoencoder, "vae"), self.device) if decodes else {}

    def size(self, *_: object) -> Size:
        return self._size

    def encode_text(self, prompts: Sequence[str]) -> Float[np.ndarray, "B L D"]:
        shape = self._config.text_len, self._config.text_dim
        seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
        return np.stack([np.random.default_rng(seed).normal(size=shape).astype(np.float32) for seed in seeds])

    def decoder(self) -> Decode:
        return super().decoder() if self._decodes else lambda latents, state: (jnp.asarray(latents), state)

    def release(self) -> None:
        """The autoencoder stays: it could not be read again."""


def pipeline(info: ModelInfo, *, tiny: bool, decodes: bool = True) -> Pipeline:
    """As `Pipeline.of`, which has the built-in world around the weights; for videos of the size in `info`."""
    (_, height, width), autoencoder = info.latent_shape, vae(tiny)
    mesh = make_mesh(devices=jax.devices()[:1])
    params = shard(random_weights(info.model, "dit"), mesh)
    size = width * autoencoder.space, height * autoencoder.space
    world = RandomWorld(info.model, autoencoder, size, decodes=decodes)
    return Pipeline(Opened(FileOptions(), info, world, Experts.of(params, info.model, mesh)))
