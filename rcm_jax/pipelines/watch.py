"""How a call is watched while it samples."""

from collections.abc import Callable
from typing import NamedTuple

from rcm_jax.types import Latents

OnStep = Callable[[Latents, int, int], object]


class Watch(NamedTuple):
    """progress: names a bar with the time left; empty for none.

    on_step: called as (latents, i, n) when i of n steps are done: latents [b, T, H, W, C] of the batch under way, in a
        causal network of the chunks that are there (its steps are chunks). An error that it raises ends the call and
        is the caller's; the pipeline can be used again.
    time_limit: seconds; TimeoutError as soon as the rest of the sampling would take longer.
    """

    progress: str = "sample"
    on_step: OnStep | None = None
    time_limit: float | None = None

    def step(self, latents: Latents, done: int, total: int) -> None:
        if self.on_step is not None:
            self.on_step(latents, done, total)
