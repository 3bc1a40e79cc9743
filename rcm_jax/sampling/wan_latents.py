"""Latents from the published networks: steps in a loop of the host, so that weights can change on the way.

A batch has one size for the whole run; what is missing is filled up. So a video's numbers come from one program and
from its own noise, text and image, whatever it is batched with.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from tqdm import tqdm

from rcm_jax.convert.checkpoint import Checkpoint
from rcm_jax.flow import guided
from rcm_jax.parallel import batch_sharding, sharded_attention
from rcm_jax.sampling.generate import SamplerConfig, draw_noise, run_sampler
from rcm_jax.types import Latents, Params, Text, Velocity
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.dit import DiT, velocity
from rcm_jax.worlds.wan.files import load


@functools.partial(jax.jit, static_argnames="dit")
def _velocity(
    dit: DiT, params: Params, text: Text, x: Latents, t: Array, condition: Latents | None, image: Array | None
) -> Latents:
    return velocity(dit, params, text, condition=condition, image=image)(x, t)


class Experts:
    """One network, or Wan2.2's two: the first where the RF time is at least `boundary`, the second below.

    With `keep_all` both stay loaded once they are; else the one that is not asked is freed.
    """

    def __init__(
        self, sources: Sequence[Checkpoint], config: DiTConfig, mesh: Mesh, *, dtype: str, boundary: float,
        keep_all: bool,
    ):  # fmt: skip
        self.sources, self.mesh, self.dtype, self.boundary, self.keep_all = sources, mesh, dtype, boundary, keep_all
        self.dit = DiT(config, attend=sharded_attention(mesh))
        self._loaded: dict[int, Params] = {}

    def params(self, t: float) -> Params:
        """The weights that serve RF time t."""
        index = 0 if len(self.sources) == 1 or t >= np.float32(self.boundary) else 1  # times are float32
        if index not in self._loaded:
            if not self.keep_all:
                self._loaded.clear()
            self._loaded[index] = load(self.sources[index], self.mesh, dtype=self.dtype)
        return self._loaded[index]

    def velocity(self, text: Text, condition: Latents | None, image: Array | None) -> Velocity:
        """For numbers t, not for inside jit."""
        return lambda x, t: _velocity(self.dit, self.params(float(t[0])), text, x, t, condition, image)


def host_loop(advance: Callable[[], object]) -> Callable:
    """`jax.lax.scan` as a loop of the host, with `advance` called after every step."""

    def loop(step: Callable, carry: Any, inputs: Any) -> tuple[Any, None]:
        for i in range(len(jax.tree.leaves(inputs)[0])):
            carry, _ = step(carry, jax.tree.map(lambda x, i=i: x[i], inputs))
            jax.block_until_ready(carry)
            advance()
        return carry, None

    return loop


def sample_wan(
    experts: Experts,
    text: Float[np.ndarray, "V L D"],
    null_text: Float[np.ndarray, "L D"] | None,
    indices: Sequence[int],
    *,
    latent_shape: tuple[int, int, int],
    sampler: SamplerConfig,
    seed: int,
    condition: Float[np.ndarray, "1 T H W C"] | None = None,
    image: Float[np.ndarray, "1 K D"] | None = None,
    batch_size: int = 1,
) -> Float[np.ndarray, "V T H W C"]:
    """Latents of V videos with one text each; the noise of video v comes from (seed, indices[v]) alone.

    null_text: for guidance; None where there is none. condition, image: of the image that all of them start from.
    """
    out = []
    shape = (sampler.noises, *latent_shape, experts.dit.config.out_channels)
    count = len(text)
    sharding = batch_sharding(experts.mesh)

    def put(x: np.ndarray | None) -> Array | None:
        return None if x is None else jax.device_put(np.broadcast_to(x, (batch_size, *x.shape[1:])), sharding)

    condition, image = put(condition), put(image)
    batches = range(0, count, batch_size)
    with tqdm(desc="sample", total=len(batches) * sampler.num_steps, unit="step", delay=2, leave=False) as bar:
        for start in batches:
            rows = np.minimum(np.arange(start, start + batch_size), count - 1)
            noise = jax.device_put(draw_noise(seed, np.asarray(indices)[rows], shape), sharding)
            network = experts.velocity(put(text[rows]), condition, image)
            if null_text is not None:
                network = guided(network, experts.velocity(put(null_text[None]), condition, image), sampler.guidance)
            latents = run_sampler(sampler, network, noise, host_loop(bar.update))
            out.append(np.asarray(latents)[: count - start])
    return np.concatenate(out)
