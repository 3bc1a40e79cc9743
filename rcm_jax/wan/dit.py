"""The Wan2.1 diffusion transformer (arXiv 2503.20314), written once: jax.jvp and jax.grad go through all of it.

    v = DiT(config).apply({"params": params}, x, t, text)               # text to video
    v = DiT(config).apply({"params": params}, x, t, text, image)        # image to video with CLIP tokens

x [B, T, H, W, C] noisy latents, t model time in 0..1000, [B] or one a latent frame [B, T], text [B, <=L, text_dim] (or
[1, <=L, text_dim] for all videos alike), image [B, tokens, image_dim]. An image-to-video network finds mask and latents
of the image in the channels of x behind the noise (`velocity` puts them there, `wan.image.image_condition` makes them).
Parameters of all blocks are stacked on a leading axis (`nn.scan`), so compile time does not grow with depth.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, PyTree

from rcm_jax.flow import guided, null_rows
from rcm_jax.kernels.attention import attention
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.spread import spread_samples, spread_tokens
from rcm_jax.types import Latents, Params, Text, Velocity
from rcm_jax.wan.block import CONTEXT_AXES, Block, BlockContext
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.layers import (
    AffineNorm,
    ChunkPast,
    Dense,
    KeyValues,
    Tokens,
    at_least_float32,
    dense,
    layer_norm,
    modulate,
)
from rcm_jax.wan.rope import rope_table, time_embedding

IMAGE_EPS = 1e-5  # of the two norms around the projection of CLIP tokens
EXACT = jax.lax.Precision.HIGHEST  # of products that stay float32: GPUs take TF32 unless told not to
MODEL_TIME = 1000.0  # the network's time is this times the rectified-flow time


class ContextVideo(NamedTuple):
    """A video of x's shape beside x: x's tokens see its keys, and it sees itself alone. So it has no tangent of x."""

    x: Latents
    t: Float[Array, " B"] | Float[Array, "B T"]
    mask: KeyRuns
    seen: KeyRuns  # between x's queries and its keys


class Head(nn.Module):
    """Modulated projection of every token to its patch of the velocity, float32."""

    config: DiTConfig
    features: int

    @nn.compact
    def __call__(self, x: Tokens, e: Float[Array, "B t D"]) -> Float[Array, "B S P"]:
        c = self.config
        table = self.param("modulation", nn.initializers.normal(c.dim**-0.5), (2, c.dim))
        shift, scale = jnp.unstack(e[:, :, None, :] + table[None, None], axis=2)
        h = modulate(layer_norm(x, c.eps), 1 + scale, shift)
        init = nn.initializers.truncated_normal(c.dim**-0.5)
        how = {"dtype": h.dtype, "kernel_init": init, "precision": EXACT}
        return dense(c, self.features, "out", **how)(h)


def _kept(remat: str) -> Callable[..., bool]:
    """What of a block is kept for its backward pass."""
    policies = jax.checkpoint_policies
    if remat == "block":
        return policies.nothing_saveable
    # not cross-attention's: with few keys it costs little to run again, and as much to keep
    attention = policies.save_only_these_names("self_attn_o", "self_attn_lse")
    if remat == "attention":
        return attention
    return policies.save_from_both_policies(attention, policies.dots_with_no_batch_dims_saveable)


class DiT(nn.Module):
    """The network. See the module's docstring for shapes; the velocity comes back in float32 (or x's float64).

    `attend` has the signature of `rcm_jax.kernels.attention.attention`: on a mesh, `parallel.sharded_attention(mesh)`.
    """

    config: DiTConfig
    attend: Callable = attention

    def setup(self):
        c = self.config
        small = nn.initializers.normal(0.02)
        exact = functools.partial(Dense, precision=EXACT)
        self.patch_embedding = dense(c, c.dim)
        self.text_in = dense(c, c.dim, kernel_init=small)
        self.text_out = dense(c, c.dim, kernel_init=small)
        self.time_in = exact(c.dim, kernel_init=small)
        self.time_out = exact(c.dim, kernel_init=small)
        self.time_projection = exact(6 * c.dim)
        if c.image_dim is not None:
            self.image_norm_in = AffineNorm(IMAGE_EPS)
            self.image_in = dense(c, c.image_dim)
            self.image_out = dense(c, c.dim)
            self.image_norm_out = AffineNorm(IMAGE_EPS)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=_kept(c.remat), prevent_cse=False)  # inside a scan CSE cannot undo it
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(CONTEXT_AXES,),
            length=c.num_layers,
            unroll=c.unroll,
        )(c, self.attend)
        self.head = Head(c, c.patch_size[0] * c.patch_size[1] * c.patch_size[2] * c.out_channels)

    def embed_text(self, text: Text) -> Tokens:
        """Zero-pads to text_len and projects; all text_len tokens are attended, without a mask."""
        c = self.config
        if text.shape[-1] != c.text_dim or text.shape[1] > c.text_len:
            raise ValueError(
                f"text has shape {text.shape}; the network takes [B, at most {c.text_len} tokens, {c.text_dim}]"
            )
        text = jnp.pad(text, ((0, 0), (0, c.text_len - text.shape[1]), (0, 0))).astype(c.dtype)
        return spread_samples(self.text_out(nn.gelu(self.text_in(text), approximate=True)))

    def embed_image(self, image: Float[Array, "B K I"] | None) -> Tokens | None:
        """CLIP tokens to the network's width; None for a network that takes none."""
        c = self.config
        if (image is None) != (c.image_dim is None) or (image is not None and image.shape[-1] != c.image_dim):
            takes = "no image tokens" if c.image_dim is None else f"image tokens [B, tokens, {c.image_dim}]"
            raise ValueError(f"the network takes {takes}, not {None if image is None else image.shape}")
        if image is None:
            return None
        image = self.image_in(self.image_norm_in(image.astype(c.dtype)))
        return self.image_norm_out(self.image_out(nn.gelu(image, approximate=False)))

    def embed_time(self, t: Float[Array, "B t"]) -> tuple[Float[Array, "B t D"], Float[Array, "B t 6 D"]]:
        """(time embedding, its projection to the blocks' six modulations), float32 whatever the network's dtype."""
        c = self.config
        if c.round_time_to:
            t = t.astype(c.round_time_to)
        t = t.astype(at_least_float32(t.dtype))
        e = self.time_out(nn.silu(self.time_in(time_embedding(t, c.freq_dim).astype(at_least_float32(c.dtype)))))
        return e, rearrange(self.time_projection(nn.silu(e)), "b t (six d) -> b t six d", six=6)

    def patchify(self, x: Latents) -> Float[Array, "B S P"]:
        """Tokens ordered (frame, row, column), numbers of a patch ordered (p_t, p_h, p_w, c)."""
        c = self.config
        _, T, H, W, C = x.shape
        if c.in_channels != C:
            condition = f", {c.in_channels - c.out_channels} of them the condition" * (c.in_channels > c.out_channels)
            raise ValueError(f"latents have {C} channels; the network takes {c.in_channels}{condition}")
        c.grid((T, H, W))  # its error
        pt, ph, pw = c.patch_size
        return rearrange(x, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)

    def unpatchify(self, tokens: Float[Array, "B S P"], grid: tuple[int, int, int]) -> Latents:
        (t, h, w), (pt, ph, pw) = grid, self.config.patch_size
        pattern = "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c"
        return rearrange(tokens, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)

    def embed(self, x: Latents, t: Array) -> tuple[Tokens, Float[Array, "B t D"], Float[Array, "B t 6 D"]]:
        """Tokens before the first block, the time embedding, and the blocks' modulations."""
        c, t = self.config, t[:, None] if t.ndim == 1 else t
        if t.shape[1] not in (1, c.grid(x.shape[1:4])[0]):
            raise ValueError(
                f"t has shape {t.shape}; give [B] or one time a latent frame, [B, {c.grid(x.shape[1:4])[0]}]"
            )
        tokens = self.patch_embedding(self.patchify(x.astype(c.dtype)))
        return spread_tokens(tokens), *self.embed_time(t)

    def tokens(
        self,
        x: Latents,
        t: Array,
        text: Text | KeyValues,
        image: Float[Array, "B K I"] | None = None,
        *,
        mask: KeyRuns | None = None,
        frames: Int[Array, "*B T"] | np.ndarray | None = None,
        past: ChunkPast | None = None,
        beside: ContextVideo | None = None,
    ) -> tuple[Tokens, Float[Array, "B t D"], PyTree]:
        """Tokens after the last block, the time embedding that the head needs with them, what all layers of the `past`
        keep."""
        c = self.config
        tokens, e, modulation = self.embed(x, t)
        has_keys = isinstance(text, KeyValues)
        context = BlockContext(
            modulation,
            rope_table(c.grid(x.shape[1:4]), c.head_dim, frames),
            text=None if has_keys else self.embed_text(text),
            text_keys=text if has_keys else None,
            image=self.embed_image(image),
            mask=mask,
            past=past,
            layer=None if past is None else jnp.arange(c.num_layers),
        )
        seen = None
        if beside is not None:
            seen, _, modulation = self.embed(beside.x, beside.t)
            view = context._replace(modulation=modulation, mask=beside.mask, text=None, text_keys=None)
            context = context._replace(of_context=view, context_mask=beside.seen)
        (tokens, _), kept = self.blocks((tokens, seen), context)
        return tokens, e, kept

    def __call__(
        self,
        x: Latents,
        t: Float[Array, " B"] | Float[Array, "B T"],
        text: Text | KeyValues,
        image: Float[Array, "B K I"] | None = None,
        *,
        mask: KeyRuns | None = None,
        frames: np.ndarray | None = None,
        beside: ContextVideo | None = None,
    ) -> Latents:
        """`mask`: which tokens see which (none: all see all). `frames`: positions of the latent frames (0, 1, …).

        x also sees the keys of a video `beside`, whose frames have the same positions.
        """
        tokens, e, _ = self.tokens(x, t, text, image, mask=mask, frames=frames, beside=beside)
        return self.unpatchify(self.head(tokens, e), self.config.grid(x.shape[1:4]))

    def chunk(
        self,
        x: Latents,
        t: Float[Array, " B"] | Float[Array, "B T"],
        text: Text | KeyValues,
        *,
        past: ChunkPast,
        frames: Int[Array, "*B T"],
    ) -> tuple[Latents, PyTree]:
        """Velocity of a chunk of a longer video, and what the `past` keeps. `frames`: where they are, for RoPE; a row a
        sample where these are of different chunks."""
        tokens, e, kept = self.tokens(x, t, text, frames=frames, past=past)
        return self.unpatchify(self.head(tokens, e), self.config.grid(x.shape[1:4])), kept


def begin_with(first: Latents | None, x: Latents) -> Latents:
    """x with the frames of `first` in place of its first ones."""
    if first is None:
        return x
    first = jnp.broadcast_to(first.astype(x.dtype), (x.shape[0], *first.shape[1:]))
    return jnp.concatenate([first, x[:, first.shape[1] :]], axis=1)


def velocity(
    dit: DiT,
    params: Params,
    text: Text,
    *,
    condition: Latents | None = None,
    image: Float[Array, "B K I"] | None = None,
    first: Latents | None = None,
) -> Velocity:
    """The network as a rectified-flow velocity (x_t, t) -> v, t [B] or [B, T] in [0, 1], bound to a text.

    For image-to-video also to its `condition`, the channels behind the noise, and the `image` tokens of CLIP; or to the
    `first` latent frames, which the network sees clean, at time 0, whatever x has there: v there means nothing.
    """

    def v(x: Latents, t: Array) -> Latents:
        if first is not None:
            t = jnp.broadcast_to(t[:, None] if t.ndim == 1 else t, x.shape[:2]).at[:, : first.shape[1]].set(0)
            x = begin_with(first, x)
        x = x if condition is None else jnp.concatenate([x, condition.astype(x.dtype)], axis=-1)
        return dit.apply({"params": params}, x, MODEL_TIME * t, text, image)

    return v


def guided_velocity(
    dit: DiT, params: Params, text: Text, null_text: Float[Array, "L D"] | Text, guidance: float, **given: Array | None
) -> Velocity:
    """`velocity` under guidance against the unconditional (or negative) text: one for all videos, or one a video."""
    null = null_rows(null_text, text.shape[0])
    return guided(velocity(dit, params, text, **given), velocity(dit, params, null, **given), guidance)


def by_noise(high: Velocity, low: Velocity, boundary: float) -> Velocity:
    """Wan2.2's two experts as one velocity: `high` where a sample's t >= boundary. All samples must be on one side."""
    return lambda x, t: jax.lax.cond(t.max() >= boundary, high, low, x, t)
