"""Cache policies by their published names."""

import dataclasses
from typing import Any

from rcm_jax.causal.cache import CachePolicy, Ring
from rcm_jax.causal.memory import MemRope
from rcm_jax.causal.selection import DeepForcing, RelaxForcing
from rcm_jax.causal.sinks import InfinityRope, RollingSink
from rcm_jax.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """The published window: `window_blocks` chunks are cached, the first `sink_blocks` of them for good. A `Ring`,
    whose window counts the current chunk, too, and not the sink."""

    window_blocks: int = 6
    sink_blocks: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sink_blocks < self.window_blocks:
            raise ArgumentError(
                "{sink_blocks} must be at least 0 and less than {window_blocks}", sink_blocks=self.sink_blocks,
                window_blocks=self.window_blocks,
            )  # fmt: skip

    def ring(self) -> Ring:
        return Ring(self.window_blocks - self.sink_blocks + 1, self.sink_blocks)


POLICIES = {
    "none": Ring,
    "sliding_window": SlidingWindow,
    "rolling_sink": RollingSink,
    "infinity_rope": InfinityRope,
    "deep_forcing": DeepForcing,
    "memrope": MemRope,
    "relax_forcing": RelaxForcing,
}


def policy_of(name: str, **settings: Any) -> CachePolicy:
    """The policy of that name. Raises ArgumentError for a name or a setting that is not known, or does not fit."""
    if name not in POLICIES:
        raise ArgumentError(f"{{cache_policy}} must be one of {', '.join(POLICIES)}", cache_policy=name)
    policy = POLICIES[name](**settings)
    return policy.ring() if isinstance(policy, SlidingWindow) else policy
