"""TAEW2.1, a tiny autoencoder for Wan2.1's latents: rougher frames for a small part of the arithmetic and the memory.

    tiny = TinyVAE(TAEW2_1)
    video = tiny.decode(params, latents)          # [B, T, H, W, 16] as a DiT gives them  ->  [B, 4T - 3, 8H, 8W, 3]
    latents = tiny.encode(params, video)          # [B, F, 8H, 8W, 3] in [-1, 1]  ->  [B, ceil(F / 4), H, W, 16]

Latents are normalised, as diffusion networks have them. All convolutions are in the plane; time passes through memory
blocks alone, each of which remembers its own input of one frame before, so that to stream it is

    frames, state = tiny.decode_chunk(params, latents[:, :1])             # 1 frame
    frames, state = tiny.decode_chunk(params, latents[:, 1:], state)      # 4 frames for each latent frame

with the same numbers. The encoder has no first frame apart: four frames are one latent frame from the start, which is
not how Wan's own autoencoder counts (1 + 4k).
"""

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array

from rcm_jax.types import Latents, Params, Video
from rcm_jax.wan.config import TinyVAEConfig
from rcm_jax.wan.in_chunks import InChunks, State, encode_compiled
from rcm_jax.wan.vae_layers import Frames, after_past

BLOCKS = 3  # memory blocks of a level


def soft_clamp(latents: Latents) -> Latents:
    """Into (-3, 3), hardly changed near 0."""
    return 3 * jnp.tanh(latents / 3)


def _conv(features: int, name: str, x: Frames, *, stride: int = 1, bias: bool = True) -> Frames:
    layer = nn.Conv(features, (3, 3), strides=stride, padding=1, use_bias=bias, dtype=x.dtype, name=name)
    return layer(x)


class MemoryBlock(nn.Module):
    """Residual block that sees a frame and, behind it on the channels, the frame before."""

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        C = x.shape[-1]
        past = after_past(self, x, 1)[:, :-1]
        h = nn.relu(_conv(C, "conv_0", jnp.concatenate([x, past], axis=-1)))
        h = nn.relu(_conv(C, "conv_1", h))
        return nn.relu(_conv(C, "conv_2", h) + x)


class Doubling(nn.Module):
    """Height and width."""

    features: int

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        x = x.repeat(2, axis=2).repeat(2, axis=3)
        return nn.Conv(self.features, (3, 3), padding=1, use_bias=False, dtype=x.dtype, name="conv")(x)


class Encoder(nn.Module):
    """Frames in [0, 1], a multiple of `config.seen` of them, to normalised latents."""

    config: TinyVAEConfig

    @nn.compact
    def __call__(self, video: Video) -> Latents:
        c = self.config
        x = nn.relu(_conv(c.encoder_width, "conv_in", video.astype(c.dtype)))
        for i, frames in enumerate(c.encoder_time):
            x = rearrange(x, "b (f s) h w c -> b f h w (s c)", s=frames)
            x = nn.Dense(c.encoder_width, use_bias=False, dtype=x.dtype, name=f"level_{i}_time")(x)
            x = _conv(c.encoder_width, f"level_{i}_space", x, stride=2, bias=False)
            for j in range(BLOCKS):
                x = MemoryBlock(name=f"level_{i}_block_{j}")(x)
        return _conv(c.z_dim, "conv_out", x).astype(jnp.promote_types(c.dtype, jnp.float32))


class Decoder(nn.Module):
    """Normalised latents to `config.time` frames each, about [0, 1], the first latent frame's not trimmed."""

    config: TinyVAEConfig

    @nn.compact
    def __call__(self, latents: Latents) -> Video:
        c = self.config
        x = nn.relu(_conv(c.decoder_widths[0], "conv_in", soft_clamp(latents).astype(c.dtype)))
        for i, frames in enumerate(c.decoder_time):
            C = x.shape[-1]
            for j in range(BLOCKS):
                x = MemoryBlock(name=f"level_{i}_block_{j}")(x)
            # published after the doubling: a layer within a pixel is the same before it, for a quarter of the work
            x = nn.Dense(frames * C, use_bias=False, dtype=x.dtype, name=f"level_{i}_time")(x)
            x = rearrange(x, "b f h w (s c) -> b (f s) h w c", s=frames)
            space = Doubling(c.decoder_widths[i + 1], name=f"level_{i}_space")
            x = space(x) if i + 1 < len(c.decoder_time) else x
        out = nn.Conv(3, (3, 3), padding=1, dtype=x.dtype, name="conv_out")
        # one frame after the other: at this size a frame is work enough, and all at once are most of the memory
        parts = [out(nn.relu(space(x[:, f : f + 1]))) for f in range(x.shape[1])]
        return jnp.concatenate(parts, axis=1).astype(jnp.promote_types(c.dtype, jnp.float32))


@dataclasses.dataclass(frozen=True)
class TinyVAE(InChunks):
    """Encoder and decoder with their parameters {"encoder": …, "decoder": …}; either half serves alone. The methods are
    those of `wan.vae.VAE`; frames are in [-1, 1] and do not leave it."""

    config: TinyVAEConfig

    def init(self, key: Array) -> Params:
        """Random weights."""
        c, keys = self.config, jax.random.split(key)
        video, latents = jnp.zeros((1, c.seen, c.space, c.space, 3)), jnp.zeros((1, 1, 1, 1, c.z_dim))
        return {
            "encoder": Encoder(c).init(keys[0], video)["params"],
            "decoder": Decoder(c).init(keys[1], latents)["params"],
        }

    def stream_latents(self, params: Params, video: Video) -> Iterator[Latents]:
        """`encode`, one latent frame after the other. The last frame stands for those that lack to a latent frame."""
        size, state = self.config.seen, None
        for start in range(0, max(1, video.shape[1]), size):
            part = video[:, start : start + size]
            if 0 < part.shape[1] < size:
                part = jnp.concatenate([part, *[part[:, -1:]] * (size - part.shape[1])], axis=1)
            latents, state = encode_compiled(self, params, part, state)
            yield latents

    def encode_chunk(self, params: Params, video: Video, state: State | None = None) -> tuple[Latents, State]:
        """The latents of the next 4k frames, with or without a state. Raises ValueError for others."""
        c, (_, F, H, W, C) = self.config, video.shape
        if C != 3 or H % c.space or W % c.space or F < 1 or F % c.seen:
            raise ValueError(f"video has shape {video.shape}; give [B, {c.seen}k, {c.space}H, {c.space}W, 3]")
        return _step(Encoder(c), params["encoder"], (video + 1) / 2, state)

    def decode_chunk(self, params: Params, latents: Latents, state: State | None = None) -> tuple[Video, State]:
        """The next frames: 4 for each latent frame, but 1 for a video's first, when there is no state yet."""
        c = self.config
        if latents.shape[-1] != c.z_dim or latents.shape[1] < 1:
            raise ValueError(f"latents have shape {latents.shape}; give [B, at least 1, H, W, {c.z_dim}]")
        frames, new = _step(Decoder(c), params["decoder"], latents, state)
        trimmed = frames[:, c.time - 1 :] if state is None else frames
        return 2 * jnp.clip(trimmed, 0, 1) - 1, new


def _step(module: nn.Module, params: Params, x: Frames, state: State | None) -> tuple[Frames, State]:
    variables = {"params": params} if state is None else {"params": params, "cache": state}
    y, new = module.apply(variables, x, mutable=["cache"])
    return y, new["cache"]
