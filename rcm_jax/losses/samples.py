"""What every loss does to the samples of a batch: sums over each, and leaves out the bad ones.

A sample is left out before anything is squared or divided: 0 · NaN and 0/0 would reach the gradient of the others'
weights, whatever the loss is multiplied by afterwards.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rcm_jax.flow import expand
from rcm_jax.types import Latents

Terms = dict[str, Array]


def sample_sum(x: Latents) -> Float[Array, " B"]:
    """Sum over all but the batch."""
    return x.sum(axis=tuple(range(1, x.ndim)))


def not_finite(*fields: Latents) -> Bool[Array, " B"]:
    """Which samples have an element that is NaN or infinite in any of the fields."""
    return ~jnp.stack([jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in fields]).all(axis=0)


def only_kept(masked: Bool[Array, " B"], *fields: Latents) -> list[Latents]:
    """The fields with zeros, and no gradient, in the masked samples."""
    return [jnp.where(expand(~masked, x), x, 0) for x in fields]
