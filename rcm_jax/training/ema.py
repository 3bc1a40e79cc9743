"""Exponential moving average of parameters with a power-function profile (EDM2, arXiv 2312.02696, section 3).

The average of n updates weighs update k by about k^gamma, so its memory grows with training: its standard deviation is
a fixed fraction, the rate, of the time trained so far, and no half-life has to be chosen.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rcm_jax.types import Params


def power_ema_exponent(rate: float) -> float:
    """gamma of a power-function average whose relative standard deviation is `rate` (rCM: 0.1, gamma = 6.94).

    The largest root (by real part) of gamma^3 + 7 gamma^2 + (16 - s^-2) gamma + (12 - s^-2) with s = rate, which is
    s^2 = (gamma+1) / ((gamma+2)^2 (gamma+3)) solved for gamma. Raises ValueError for a rate not above 0.
    """
    if not rate > 0:
        raise ValueError(f"{rate=} must be above 0; EDM2 uses 0.05 to 0.2, and 1/sqrt(12) = 0.289 is the plain average")
    t = float(rate) ** -2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def power_ema_beta(n: Int[Array, ""] | int | np.ndarray, gamma: float) -> Float[Array, ""] | np.ndarray:
    """beta(n) = (1 - 1/(n+1))^(gamma+1), the weight that the average keeps at update n; 0 for n < 1 (it copies).

    `n` counts updates of the averaged network. A traced or JAX `n` gives JAX's default float, a Python or numpy one
    gives float64 numpy. Taken through log1p: near 1, float32 would lose the digits of 1 - beta, which are what counts.
    """
    xp = jnp if isinstance(n, jax.Array) else np
    n = xp.asarray(n).astype(jnp.result_type(float) if xp is jnp else np.float64)
    beta = xp.exp((gamma + 1) * xp.log1p(-1 / (xp.maximum(n, 1) + 1)))
    return xp.where(n < 1, xp.zeros_like(beta), beta)


def ema_update(ema: Params, params: Params, beta: Float[Array, ""] | float) -> Params:
    """ema <- beta ema + (1 - beta) params, leaf by leaf, in the dtype of `ema` (keep that one float32)."""

    def leaf(e: Array, p: Array) -> Array:
        return jnp.asarray(beta, e.dtype) * e + jnp.asarray(1 - beta, e.dtype) * p.astype(e.dtype)

    return jax.tree.map(leaf, ema, params)
