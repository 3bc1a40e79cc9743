"""The video autoencoders of Wan2.1 (arXiv 2503.20314) and Wan2.2, causal in time: a frame depends on no later one.

    vae = VAE(WAN_VAE)
    latents = vae.encode(params, video)          # [B, 1 + 4k, 8H, 8W, 3] in [-1, 1]  ->  [B, 1 + k, H, W, 16]
    video = vae.decode(params, latents)          # and back

    vae = VAE(WAN22_VAE)                         # [B, 1 + 4k, 16H, 16W, 3]  ->  [B, 1 + k, H, W, 48]

The first latent frame stands for one frame, every other for four. Time passes in steps of one latent frame, and what a
step must know of the past is a state of one shape for every step. `encode` and `decode` are loops of the host over two
compiled programs, the first step and any other; inside jit, or to stream, it is

    frames, state = vae.decode_chunk(params, latents[:, :1])             # 1 frame
    frames, state = vae.decode_chunk(params, latents[:, 1:], state)      # 4 frames for each latent frame

with the same numbers. Memory does not grow with the length of a video, but for the video.
"""

import dataclasses
import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from rcm_jax.types import Latents, Params, Video
from rcm_jax.wan.config import VAEConfig
from rcm_jax.wan.in_chunks import InChunks, State, encode_compiled
from rcm_jax.wan.tiles import blend_tiles
from rcm_jax.wan.vae_layers import (
    CausalConv,
    Downsample,
    Frames,
    Middle,
    Norm,
    ResidualBlock,
    Upsample,
    averaged,
    by_channel,
    from_patches,
    repeated,
    to_patches,
)


class Encoder(nn.Module):
    """The first frame of a video, or 4 that follow, to the mean of one latent frame, not normalised."""

    config: VAEConfig
    first: bool

    @nn.compact
    def __call__(self, video: Video) -> Latents:
        c, dim = self.config, self.config.width["encoder"]
        x = CausalConv(dim, name="conv_in")(to_patches(video.astype(c.dtype), c.patch_size))
        for i, (mult, temporal) in enumerate(zip(c.dim_mult, (*c.temporal_downsample, None), strict=True)):
            level = x
            for j in range(c.num_res_blocks):
                x = ResidualBlock(dim * mult, name=f"level_{i}_block_{j}")(x)
            if temporal is not None:
                x = Downsample(temporal, self.first, name=f"level_{i}_down")(x)
            if c.residual:
                x = x + averaged(level, dim * mult, time=1 + bool(temporal), space=1 if temporal is None else 2)
        x = Middle(c, name="middle")(x)
        x = CausalConv(2 * c.z_dim, name="conv_out")(nn.silu(Norm(name="norm_out")(x)))
        x = nn.Dense(2 * c.z_dim, dtype=x.dtype, name="moments")(x)
        return x[..., : c.z_dim].astype(jnp.promote_types(c.dtype, jnp.float32))


class Decoder(nn.Module):
    """One latent frame, not normalised, to the first frame of a video, or to the 4 that follow."""

    config: VAEConfig
    first: bool

    @nn.compact
    def __call__(self, latents: Latents) -> Video:
        c, dim = self.config, self.config.width["decoder"]
        x = nn.Dense(c.z_dim, dtype=c.dtype, name="latents")(latents.astype(c.dtype))
        x = CausalConv(dim * c.dim_mult[-1], name="conv_in")(x)
        x = Middle(c, name="middle")(x)
        ups = (*reversed(c.temporal_downsample), None)
        for i, (mult, temporal) in enumerate(zip(reversed(c.dim_mult), ups, strict=True)):
            level, features = x, dim * mult
            for j in range(c.num_res_blocks + 1):
                x = ResidualBlock(features, name=f"level_{i}_block_{j}")(x)
            if temporal is None:
                break
            wide = features if c.residual else features // 2
            x = Upsample(wide, temporal, self.first, name=f"level_{i}_up")(x)
            if c.residual:
                x = x + repeated(level, features, time=1 + temporal, space=2, first=self.first)
        x = CausalConv(3 * c.patch_size**2, name="conv_out")(nn.silu(Norm(name="norm_out")(x)))
        return from_patches(x, c.patch_size).astype(jnp.promote_types(c.dtype, jnp.float32))


@dataclasses.dataclass(frozen=True)
class VAE(InChunks):
    """Encoder and decoder with their parameters {"encoder": …, "decoder": …}; either half serves alone.

    Latents are the mean, each channel normalised. Frames are not clipped: values may leave [-1, 1].
    """

    config: VAEConfig

    def init(self, key: Array) -> Params:
        """Random weights."""
        c, keys = self.config, jax.random.split(key)
        video, latents = jnp.zeros((1, c.time, c.space, c.space, 3)), jnp.zeros((1, 1, 1, 1, c.z_dim))
        return {
            "encoder": Encoder(c, first=False).init(keys[0], video)["params"],
            "decoder": Decoder(c, first=False).init(keys[1], latents)["params"],
        }

    def stream_latents(self, params: Params, video: Video) -> Iterator[Latents]:
        """`encode`, one latent frame after the other."""
        self._check(video.shape, first=True)
        ends = range(1, video.shape[1] + self.config.time, self.config.time)
        state = None
        for start, end in zip((0, *ends), ends, strict=False):
            latents, state = encode_compiled(self, params, video[:, start:end], state)
            yield latents

    def encode_chunk(self, params: Params, video: Video, state: State | None = None) -> tuple[Latents, State]:
        """The latents of the next frames: 1 + 4k of them without a state, 4k with one. Raises ValueError else."""
        c = self.config
        self._check(video.shape, first=state is None)
        latents, state = _in_steps(Encoder, c, params["encoder"], video, c.time, state)
        return (latents - by_channel(c.mean, latents.dtype)) / by_channel(c.std, latents.dtype), state

    def _check(self, shape: tuple[int, ...], first: bool) -> None:
        c, (_, F, H, W, C) = self.config, shape
        if C != 3 or H % c.space or W % c.space or F < 1 or (F - first) % c.time:
            frames = f"1 + {c.time}k" if first else f"{c.time}k"
            raise ValueError(f"video has shape {shape}; give [B, {frames}, {c.space}H, {c.space}W, 3]")

    def decode_chunk(self, params: Params, latents: Latents, state: State | None = None) -> tuple[Video, State]:
        """The next frames: 4 for each latent frame, but 1 for a video's first, when there is no state yet."""
        c = self.config
        if latents.shape[-1] != c.z_dim or latents.shape[1] < 1:
            raise ValueError(f"latents have shape {latents.shape}; give [B, at least 1, H, W, {c.z_dim}]")
        latents = latents.astype(jnp.promote_types(latents.dtype, jnp.float32))
        latents = latents * by_channel(c.std, latents.dtype) + by_channel(c.mean, latents.dtype)
        return _in_steps(Decoder, c, params["decoder"], latents, 1, state)

    def decode_tiled(
        self, params: Params, latents: Latents, tile: tuple[int, int] = (32, 32), overlap: int = 8
    ) -> Float[np.ndarray, "B F H W 3"]:
        """`decode` for a device that cannot hold a whole frame's features: see `blend_tiles`.

        Not the same numbers: a tile does not attend to the rest of its frame.
        """
        return blend_tiles(functools.partial(self.decode, params), latents, self.config.space, tile, overlap)


def _in_steps(module, config: VAEConfig, params: Params, x: Frames, size: int, state: State | None):
    """Frame 0 alone if there is no state, then `size` frames a step; a step is one compiled program."""

    def step(state: State | None, x: Frames) -> tuple[State, Frames]:
        variables = {"params": params} if state is None else {"params": params, "cache": state}
        y, new = module(config, first=state is None).apply(variables, x, mutable=["cache"])
        return new["cache"], y

    parts = []
    if state is None:
        state, y = step(None, x[:, :1])
        parts, x = [y], x[:, 1:]
    if x.shape[1] == size:  # no loop: on a CPU, convolutions inside one run on a single core
        state, y = step(state, x)
        parts.append(y)
    elif x.shape[1]:
        steps = rearrange(x, "b (step f) h w c -> step b f h w c", f=size)
        state, y = jax.lax.scan(step, state, steps)
        parts.append(rearrange(y, "step b f h w c -> b (step f) h w c"))
    return jnp.concatenate(parts, axis=1), state
