"""Floating-point operations of a DiT and of a training step, from the model's formula: what MFU is a share of.

Counted are matrix products, 2 operations a multiplication and addition: projections, feed-forward, attention over all
tokens and over the text, patches. Not: norms, softmax, time's embedding, the optimiser, and what remat makes again. A
derivative along a direction makes each product of a layer once more (attention: 6 products for 2); a gradient twice
more (attention: 5 for 2).
"""

import dataclasses
import math

from rcm_jax.aot.costs import RATES
from rcm_jax.wan.config import DiTConfig


@dataclasses.dataclass(frozen=True)
class Forward:
    """One call for one video: operations in layers and in attention."""

    layers: float
    attention: float

    @property
    def plain(self) -> float:
        return self.layers + self.attention

    @property
    def with_gradient(self) -> float:
        return 3 * self.layers + 3.5 * self.attention

    @property
    def with_tangent_and_gradient(self) -> float:
        """Value, tangent and gradient in one pass."""
        return 4 * self.layers + 5.5 * self.attention


def forward(c: DiTConfig, latent_shape: tuple[int, int, int]) -> Forward:
    tokens, patch = math.prod(c.grid(latent_shape)), math.prod(c.patch_size)
    a_layer = tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim) + c.text_len * 2 * c.dim**2  # text: keys and values
    ends = tokens * patch * (c.in_channels + c.out_channels) * c.dim + c.text_len * (c.text_dim + c.dim) * c.dim
    return Forward(
        layers=2.0 * (c.num_layers * a_layer + ends),
        attention=4.0 * c.num_layers * tokens * (tokens + c.text_len) * c.dim,
    )


def student_step(f: Forward, num_steps: int) -> float:
    """Consistency: a guided teacher (2 calls), the student in one pass. Distribution: num_steps simulated steps, the
    last with gradient, the fake score, a guided teacher."""
    return 2 * f.plain + f.with_tangent_and_gradient + (num_steps - 1) * f.plain + f.with_gradient + 3 * f.plain


def critic_step(f: Forward, num_steps: int) -> float:
    """The student's video in num_steps steps, and the fake score with gradient."""
    return num_steps * f.plain + f.with_gradient


def peak(device_kind: str) -> float | None:
    """By data sheet; None for a device that is not in the list."""
    return next((rates.products for name, rates in RATES.items() if name.upper() in device_kind), None)
