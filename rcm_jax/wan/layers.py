"""What Wan2.1's transformers are built of: norms, modulation, and attention with its keys apart."""

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, PyTree

from rcm_jax.kernels.attention import Past
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.spread import for_every_token, for_every_video, gathered_product, spread_tokens
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.rope import apply_rope

Tokens = Float[Array, "B S D"]
LORA_DOWN, LORA_UP = "lora_down", "lora_up"  # parameters that a linear layer may have besides its own


def at_least_float32(dtype):
    """float32, or float64 where that is asked for: what norms, modulation and times are computed in."""
    return jnp.promote_types(dtype, jnp.float32)


def layer_norm(x: Tokens, eps: float) -> Tokens:
    """Zero mean and unit variance over the width, without parameters; in float32 or better."""
    x = x.astype(at_least_float32(x.dtype))
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def modulate(x: Tokens, scale: Float[Array, "B t D"], shift: Float[Array, "B t D"] | None = None) -> Tokens:
    """x·scale + shift, where t (1, or the latent frames) divides S: every frame's tokens share that frame's row."""
    scale, shift = (_of_tokens(row, x.shape[1]) for row in (scale, shift))
    return x * scale if shift is None else x * scale + shift


def _of_tokens(rows: Float[Array, "B t D"] | None, tokens: int) -> Float[Array, "B S D"] | None:
    """Each frame's row for each of its tokens. The rows are spread, not the tokens gathered by frame: these may be cut
    over devices between frames, and products that follow have them as they lie."""
    return rows if rows is None or rows.shape[1] == 1 else for_every_token(rows, tokens)


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the full width, before the split into heads."""

    eps: float

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(at_least_float32(x.dtype))
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * scale[None, None]).astype(x.dtype)


class AffineNorm(nn.Module):
    """LayerNorm with scale and bias."""

    eps: float

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return (layer_norm(x, self.eps) * scale[None, None] + bias[None, None]).astype(x.dtype)


class Dense(nn.Dense):
    """A linear layer; where its parameters hold `lora_down` [in, rank] and `lora_up` [rank, out] besides, their product
    is added to the kernel without being formed. The weights of several devices are gathered."""

    dot_general: Callable = gathered_product

    @nn.nowrap  # or what is called here, the layer as it is without LoRA, would have another scope
    def __call__(self, inputs: Tokens) -> Tokens:
        y = super().__call__(inputs)
        if not self.has_variable("params", LORA_DOWN):
            return y
        with jax.named_scope(f"{self.name}/lora"):
            x = inputs.astype(y.dtype)
            for name in (LORA_DOWN, LORA_UP):
                factor = self.get_variable("params", name).astype(y.dtype)
                x = self.dot_general(x, factor, (((x.ndim - 1,), (0,)), ((), ())), precision=self.precision)
            return y + x


def dense(config: DiTConfig, features: int, name: str | None = None, **kwargs) -> Dense:
    """A projection in the network's dtype, as Wan2.1 initialises it."""
    kwargs = {"dtype": jnp.dtype(config.dtype), "kernel_init": nn.initializers.xavier_uniform()} | kwargs
    return Dense(features, name=name, **kwargs)


class KeyValues(NamedTuple):
    """Keys (normalised) and values of attention; all layers of them have a leading axis."""

    k: Float[Array, "... B K N d"]
    v: Float[Array, "... B K N d"]

    def turned(self, rope: tuple[Array, Array]) -> "KeyValues":
        """With keys turned by RoPE."""
        return KeyValues(apply_rope(self.k, rope), self.v)

    def with_chunk(self, own: "KeyValues", slot: Int[Array, ""] | int) -> "KeyValues":
        """`own` written over the keys from `slot` on."""

        def write(buffer: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), slot, axis=buffer.ndim - 3)

        return KeyValues(write(self.k, own.k), write(self.v, own.v))


class ChunkPast(Protocol):
    """What a chunk of a longer video sees besides itself, all layers of it: a pytree (`rcm_jax.causal`)."""

    def attend(
        self, attend: Callable, q: Float[Array, "B S N d"], own: KeyValues, rope: tuple[Array, Array],
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B S N d"], PyTree]:  # fmt: skip
        """(attention's result in one layer, what is kept of that layer). q and own are before RoPE; `rope` is the
        chunk's table."""
        ...


class Attention(nn.Module):
    """Multi-head attention, q and k normalised over the full width: `keys` of what is seen, then the call.

    Keys of one sample serve all. Tokens of an `image` have keys and values of their own, and a softmax of their own:
    its result is added.
    """

    config: DiTConfig
    attend: Callable

    def setup(self):
        c = self.config
        self.q, self.k, self.v, self.o = (dense(c, c.dim) for _ in range(4))
        self.k_img, self.v_img = dense(c, c.dim), dense(c, c.dim)  # no parameters unless called
        self.norm_q, self.norm_k, self.norm_k_img = (RMSNorm(c.eps) for _ in range(3))

    def heads(self, tokens: Tokens) -> Float[Array, "B S N d"]:
        return rearrange(tokens, "b s (n d) -> b s n d", n=self.config.num_heads)

    def keys(self, context: Tokens) -> KeyValues:
        return self._as_keys(self.k(context), self.v(context))

    def own_keys(self, x: Tokens) -> KeyValues:
        """Of the sequence itself, before RoPE."""
        return self._as_own(self.k(x), self.v(x))

    def _as_own(self, k: Tokens, v: Tokens) -> KeyValues:
        return self._as_keys(spread_tokens(k), spread_tokens(v))  # or a cache cut by heads would have all gathered

    def _as_keys(self, k: Tokens, v: Tokens) -> KeyValues:
        return KeyValues(self.heads(self.norm_k(k)), self.heads(v))

    def on(self, x: Tokens, rope: tuple[Array, Array], past: ChunkPast, layer: Int[Array, ""]) -> tuple[Tokens, PyTree]:
        """Attention of a chunk to its past and to itself; and what the past keeps of its keys."""
        attend = functools.partial(self.attend, implementation=self.config.attention, name=self.name)
        # One by one: of three small products of one x XLA makes one, for which it first copies their weights out of the
        # layers' stacks, and keeps the copies from a chunk's first pass to its last.
        x, q = jax.lax.optimization_barrier((x, self.q(x)))
        x, k = jax.lax.optimization_barrier((x, self.k(x)))
        o, kept = past.attend(attend, self.heads(self.norm_q(q)), self._as_own(k, self.v(x)), rope, layer)
        return self.o(rearrange(o, "b s n d -> b s (n d)")), kept

    def __call__(
        self,
        x: Tokens,
        seen: KeyValues,
        rope: tuple[Array, Array] | None = None,
        mask: KeyRuns | None = None,
        image: Tokens | None = None,
        past: Past | None = None,
        **static: bool,
    ) -> Tokens:
        attend = functools.partial(self.attend, implementation=self.config.attention, name=self.name, **static)
        q = self.heads(self.norm_q(self.q(x)))
        q = q if rope is None else apply_rope(q, rope)
        seen = KeyValues(*(for_every_video(keys, x.shape[0]) for keys in seen))
        o = attend(q, *seen, mask=mask) if past is None else attend(q, *seen, mask=mask, past=past)
        if image is not None:
            o = o + attend(q, self.heads(self.norm_k_img(self.k_img(image))), self.heads(self.v_img(image)))
        return self.o(rearrange(o, "b s n d -> b s (n d)"))
