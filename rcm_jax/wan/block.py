"""A block of the Wan2.1 transformer: for a video, for a chunk on a cache, and for a video beside its context."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from rcm_jax.kernels.attention import Past
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.spread import spread_samples, spread_tokens
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.layers import AffineNorm, Attention, ChunkPast, KeyValues, Tokens, dense, layer_norm, modulate


class BlockContext(NamedTuple):
    """What a block sees besides the tokens that pass through it.

    All blocks share it but for `layer`, its number, and `text_keys`, of which each has its own, the layers in front.
    """

    modulation: Float[Array, "B t 6 D"]  # of time, to which a block adds its own table
    rope: tuple[Array, Array]
    text: Tokens | None = None  # or its keys
    text_keys: KeyValues | None = None
    image: Tokens | None = None
    mask: KeyRuns | None = None
    past: ChunkPast | None = None
    layer: Int[Array, ""] | None = None  # where there is a past
    of_context: "BlockContext | None" = None  # what the tokens of a `ContextVideo` see
    context_mask: KeyRuns | None = None  # between x and these


SHARED = BlockContext(*(nn.broadcast,) * len(BlockContext._fields))
CONTEXT_AXES = SHARED._replace(text_keys=0, layer=0)  # for nn.scan: which axis is the layers', if any
Streams = tuple[Tokens, Tokens | None]  # x, and the context beside it if there is one


class Block(nn.Module):
    """Self-attention, cross-attention to text and image, feed-forward; first and last modulated by time.

    With a `past`, x is a chunk of a longer video, and what the past keeps of it is returned. A context beside x passes
    first, and x sees its keys.
    """

    config: DiTConfig
    attend: Callable

    def setup(self):
        c = self.config
        self.table = self.param("modulation", nn.initializers.normal(c.dim**-0.5), (6, c.dim))
        self.self_attn, self.cross_attn = (Attention(c, self.attend) for _ in range(2))
        self.norm3 = AffineNorm(c.eps)
        self.ffn_in, self.ffn_out = dense(c, c.ffn_dim), dense(c, c.dim)

    def __call__(self, streams: Streams, context: BlockContext) -> tuple[Streams, PyTree]:
        x, beside = streams
        if context.text_keys is None:
            context = context._replace(text_keys=self.cross_attn.keys(spread_samples(context.text)))
        seen = None
        if beside is not None:  # on its own: in one sequence with x its tangent would be zeros to compute with
            view = context.of_context._replace(text_keys=context.text_keys)
            beside, keys = self.one(beside, view, fused=False)  # which is for what has a tangent
            seen = Past(*keys, context.context_mask)
        x, kept = self.one(x, context, seen)
        return (x, beside), None if context.past is None else kept

    def one(
        self, x: Tokens, context: BlockContext, beside: Past | None = None, **static: bool
    ) -> tuple[Tokens, KeyValues | PyTree]:
        """The block for one sequence, and its own keys, or what the past keeps. `static` is for attention."""
        c = self.config
        modulation = spread_samples(context.modulation) + self.table[None, None]
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = jnp.unstack(modulation, axis=2)

        def gated(x, y, gate):  # residual sums in float32, stored in the network's dtype
            return (x.astype(gate.dtype) + modulate(y.astype(gate.dtype), gate)).astype(x.dtype)

        h = modulate(layer_norm(x, c.eps), 1 + scale_a, shift_a).astype(x.dtype)
        if context.past is None:
            kept = self.self_attn.own_keys(h).turned(context.rope)
            o = self.self_attn(h, kept, context.rope, context.mask, past=beside, **static)
        else:
            o, kept = self.self_attn.on(h, context.rope, context.past, context.layer)
        x = gated(x, o, gate_a)
        x = x + self.cross_attn(self.norm3(x), context.text_keys, image=context.image, **static)
        h = modulate(layer_norm(x, c.eps), 1 + scale_f, shift_f).astype(x.dtype)
        h = nn.gelu(self.ffn_in(h), approximate=True)
        return spread_tokens(gated(x, self.ffn_out(h), gate_f)), kept
