"""Keys and values in front of a sequence's own, as they lie: of one layer or all, before RoPE, in few bytes."""

from typing import NamedTuple

import jax
from einops import rearrange
from jaxtyping import Array, Float, Int, PyTree

from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.turning import turned
from rcm_jax.quant import Stored, restore


class Past(NamedTuple):
    """Keys and values in front of a sequence's own, and the mask between the queries and them.

    With a `layer`, k and v are a stack [L, B, P, N, D] of which it is the one that is meant: a cache of all layers,
    which kernels read where it lies. Then they may be chunks in few bytes, too: arrays that begin with [L, slots].

    rope: where keys are before RoPE, cos and sin of all of them. rows: which of the stored tokens are meant, in the
    order in which `mask` and `rope` have them; all of them as they lie by default.
    """

    k: Float[Array, "B P N D"] | Float[Array, "L B P N D"] | Stored
    v: Float[Array, "B P N V"] | Float[Array, "L B P N V"] | Stored
    mask: KeyRuns | None = None
    layer: Int[Array, ""] | None = None
    rope: tuple[Float[Array, "K h"], Float[Array, "K h"]] | None = None
    rows: Int[Array, " K"] | None = None

    @property
    def apart(self) -> bool:
        """Whether it stays where it is, and what is seen of it is joined to the rest by lse."""
        return self.layer is not None or (self.mask is not None and self.mask.kv_len is not None)

    @property
    def as_stored(self) -> bool:
        """Whether attention's operands are still to be made of k and v."""
        return self.rope is not None or self.rows is not None or isinstance(self.k, Stored)

    def one(self, dtype: jax.typing.DTypeLike) -> tuple[Float[Array, "B P N D"], Float[Array, "B P N V"]]:
        """k and v of the layer as attention takes them: what was stored comes back in `dtype`."""
        k, v = (_read(x, self.layer, dtype) for x in self[:2])
        if self.rows is not None:
            k, v = (x[:, self.rows] for x in (k, v))
        return k if self.rope is None else turned(k, *(z[None, :, None] for z in self.rope)), v

    def made(self, dtype: jax.typing.DTypeLike) -> "Past":
        """One layer, as attention takes it."""
        return Past(*self.one(dtype), self.mask)


def of_layer(tree: PyTree, layer: Int[Array, ""] | int) -> PyTree:
    """One layer of arrays that begin with all of them."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), tree)


def _read(
    x: Array | Stored, layer: Int[Array, ""] | None, dtype: jax.typing.DTypeLike
) -> Float[Array, "B P N D"]:  # fmt: skip
    x = x if layer is None else of_layer(x, layer)
    if not isinstance(x, Stored):
        return x
    return rearrange(jax.vmap(restore)(x), "c b s n d -> b (c s) n d").astype(dtype)
