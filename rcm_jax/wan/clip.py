"""CLIP's image tower (open-clip XLM-RoBERTa ViT-H/14): an image to the tokens that image-to-video attends to.

    tokens = CLIP(CLIP_VIT_H).apply({"params": params}, preprocess(image))      # [B, H, W, 3] -> [B, 257, 1280]

Wan takes the tokens before the tower's last block, without a final norm; so that block is not here.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from rcm_jax.kernels.attention import attention
from rcm_jax.wan.config import CLIPConfig
from rcm_jax.wan.image import resize_bicubic
from rcm_jax.wan.layers import AffineNorm, Tokens

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(image: Float[Array, "B H W 3"], size: int = 224) -> Float[Array, "B size size 3"]:
    """An image in [-1, 1], stretched to a square and normalised."""
    image = resize_bicubic(image, (size, size)) * 0.5 + 0.5
    return (image - jnp.asarray(MEAN, image.dtype)[None, None, None]) / jnp.asarray(STD, image.dtype)[None, None, None]


class Block(nn.Module):
    config: CLIPConfig

    @nn.compact
    def __call__(self, x: Tokens) -> tuple[Tokens, None]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        h = nn.Dense(3 * c.dim, dtype=dtype, name="qkv")(AffineNorm(c.eps, name="norm_attention")(x))
        q, k, v = jnp.unstack(rearrange(h, "b s (qkv n d) -> b s qkv n d", qkv=3, n=c.num_heads), axis=2)
        o = attention(q, k, v, implementation=c.attention)
        x = x + nn.Dense(c.dim, dtype=dtype, name="o")(rearrange(o, "b s n d -> b s (n d)"))
        h = nn.Dense(c.mlp_ratio * c.dim, dtype=dtype, name="mlp_in")(AffineNorm(c.eps, name="norm_mlp")(x))
        return x + nn.Dense(c.dim, dtype=dtype, name="mlp_out")(nn.gelu(h, approximate=False)), None


class CLIP(nn.Module):
    """The tower: class token, then patches by row and column. Raises ValueError for another size of image."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"]) -> Tokens:
        c = self.config
        if image.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"image has shape {image.shape}; give [B, {c.image_size}, {c.image_size}, 3]")
        patch = (c.patch_size, c.patch_size)
        embed = nn.Conv(
            c.dim,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=False,
            dtype=jnp.dtype(c.dtype),
            name="patch_embedding",
        )
        x = rearrange(embed(image.astype(c.dtype)), "b h w d -> b (h w) d")
        small = nn.initializers.normal(c.dim**-0.5)
        first = self.param("class_token", small, (c.dim,)).astype(x.dtype)
        place = self.param("position", small, (c.tokens, c.dim)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, c.dim)), x], axis=1) + place[None]
        x = AffineNorm(c.eps, name="norm_in")(x)
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers)
        return blocks(c, name="blocks")(x)[0]
