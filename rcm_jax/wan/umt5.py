"""The umT5 encoder (arXiv 2304.09151): a prompt's tokens to the features that the DiT attends to.

    features = UMT5(UMT5_XXL).apply({"params": params}, ids, mask)       # [B, L] and [B, L] -> [B, L, dim]

Against T5 every layer has a table of relative positions of its own. Blocks are stacked as in the DiT.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Int

from rcm_jax.types import Text
from rcm_jax.wan.config import UMT5Config
from rcm_jax.wan.layers import RMSNorm


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "L L"]:
    """The bucket of every (query, key): half of them for keys behind the query. Near ones have a bucket a distance, the
    others share them by the logarithm, and all from `max_distance` on the last."""
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, near = buckets // 2, buckets // 4
    distance = np.abs(offset)
    share = np.log(np.maximum(distance, 1) / np.float32(near), dtype=np.float32) / np.float32(
        np.log(max_distance / near)
    )
    far = near + (share * (half - near)).astype(int)
    return half * (offset > 0) + np.where(distance < near, distance, np.minimum(far, half - 1))


def _dense(config: UMT5Config, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=jnp.dtype(config.dtype), name=name)


class Block(nn.Module):
    """Self-attention without a scale, gated feed-forward, each behind a norm."""

    config: UMT5Config

    @nn.compact
    def __call__(self, x: Text, mask: Int[Array, "B L"], buckets: Int[Array, "L L"]) -> tuple[Text, None]:
        c = self.config
        exact = jnp.promote_types(c.dtype, jnp.float32)
        h = RMSNorm(c.eps, name="norm_attention")(x)
        qkv = (_dense(c, c.attention_dim, n)(h) for n in "qkv")
        q, k, v = (rearrange(x, "b s (n d) -> b s n d", n=c.num_heads) for x in qkv)
        table = self.param("position", nn.initializers.normal(0.1), (c.buckets, c.num_heads))
        scores = jnp.einsum("bsnd,btnd->bnst", q, k, preferred_element_type=exact)
        scores = scores + rearrange(table[buckets].astype(exact), "s t n -> 1 n s t")
        scores = jnp.where(mask[:, None, None, :] > 0, scores, jnp.finfo(exact).min)
        o = jnp.einsum("bnst,btnd->bsnd", jax.nn.softmax(scores).astype(v.dtype), v)
        x = x + _dense(c, c.dim, "o")(rearrange(o, "b s n d -> b s (n d)"))
        h = RMSNorm(c.eps, name="norm_ffn")(x)
        h = _dense(c, c.ffn_dim, "ffn_in")(h) * nn.gelu(_dense(c, c.ffn_dim, "ffn_gate")(h), approximate=True)
        return x + _dense(c, c.dim, "ffn_out")(h), None


class UMT5(nn.Module):
    """The network; features come in the config's dtype. An id outside the vocabulary gives NaN."""

    config: UMT5Config

    def setup(self):
        c = self.config
        self.token_embedding = self.param("token_embedding", nn.initializers.normal(1.0), (c.vocabulary, c.dim))
        self.blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
        )(c)
        self.norm = RMSNorm(c.eps)

    def hidden(self, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Text:
        """The features of padding too."""
        c = self.config
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise ValueError(f"ids {ids.shape} and mask {mask.shape} must be [B, L], both")
        x = jnp.take(self.token_embedding, ids, axis=0, mode="fill").astype(c.dtype)
        x, _ = self.blocks(x, mask, jnp.asarray(relative_buckets(ids.shape[1], c.buckets, c.max_distance)))
        return self.norm(x)

    def __call__(self, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Text:
        """Features of the tokens where `mask` is 1, which they alone are attended; zeros elsewhere, as Wan wants."""
        return jnp.where(mask[:, :, None] > 0, self.hidden(ids, mask), 0)
