"""Attention over keys that lie in several places: over each part by itself, then put together by lse."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def join(
    o: Float[Array, "P B S N V"], lse: Float[Array, "P B N S"]
) -> tuple[Float[Array, "B S N V"], Float[Array, "B N S"]]:
    """Attention over all keys from that over each part: o = Σ exp(lse_p - lse) o_p. Without keys lse is -inf."""
    highest = lse.max(axis=0)
    weights = jnp.exp(lse - jnp.where(highest == -jnp.inf, 0, highest)[None])
    total = weights.sum(axis=0)
    weights = (weights / jnp.where(total == 0, 1, total)[None]).swapaxes(2, 3)[..., None]
    return (weights * o).sum(axis=0), highest + jnp.log(total)
