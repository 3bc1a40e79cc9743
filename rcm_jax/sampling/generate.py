"""From prompts to video with one network: noise by (seed, index), batches, progress.

Video i of a seed is the same whatever it is batched with, since its noise comes from (seed, i) alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from rcm_jax.sampling.few_step import few_step_times, sample_few_step
from rcm_jax.sampling.ode import rcm_times, sample_ode, wan_times
from rcm_jax.types import Latents, Params, Velocity
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.dit import DiT, guided_velocity, velocity
from rcm_jax.worlds.world import World

SAMPLERS = ("few_step", "euler", "unipc", "dpm++", "wan_unipc", "wan_dpm++")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to sample. `few_step` is the student's sampler (num_steps 1 to 4); the others are ODE solvers with guidance.

    euler, unipc and dpm++ use rCM's real-valued times, wan_unipc and wan_dpm++ the official Wan2.1 ones (integer
    model times).
    """

    name: str = "few_step"
    num_steps: int = 4
    sigma_max: float = 80.0
    guidance: float = 5.0
    shift: float = 5.0

    @property
    def noises(self) -> int:
        """How many arrays of noise a video takes: a student's sampler draws fresh noise at every step."""
        return self.num_steps if self.name == "few_step" else 1

    def __post_init__(self):
        if self.name not in SAMPLERS:
            raise ValueError(f"sampler {self.name!r} is unknown; use one of {SAMPLERS}")
        if self.name == "few_step":
            few_step_times(self.num_steps, self.sigma_max)  # its errors, before anything is compiled
        elif self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1")


def draw_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Float[Array, "B n ..."]:
    """Standard normal noise for each video, [len(indices), *shape], row i from (seed, indices[i]) alone."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(indices, jnp.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def run_sampler(
    sampler: SamplerConfig, network: Velocity, noise: Float[Array, "B n T H W C"], loop: Callable = jax.lax.scan
) -> Latents:
    """Latents of one batch from a velocity, guided where it should be. noise: the start, then one for each further
    few-step step. `loop` runs the steps: see `sample_few_step`."""
    if sampler.name == "few_step":
        return sample_few_step(
            network, noise[:, 0], step_noises=jnp.moveaxis(noise[:, 1:], 1, 0), num_steps=sampler.num_steps,
            sigma_max=sampler.sigma_max, loop=loop,
        )  # fmt: skip
    solver = sampler.name.removeprefix("wan_")
    if sampler.name.startswith("wan_"):
        schedule = wan_times(sampler.num_steps, sampler.shift, solver=solver)
    else:
        schedule = rcm_times(sampler.num_steps, sampler.shift)
    return sample_ode(network, noise[:, 0], schedule=schedule, solver=solver, loop=loop)


def sample_latents(
    params: Params, text: Array, null_text: Array, noise: Array, *, model: DiTConfig, sampler: SamplerConfig
) -> Latents:
    """Latents of one batch. noise [B, n, T, H, W, C] as in `run_sampler`."""
    dit = DiT(model)
    if sampler.name == "few_step":
        network = velocity(dit, params, text)
    else:
        network = guided_velocity(dit, params, text, null_text, sampler.guidance)
    return run_sampler(sampler, network, noise)


_sample_latents = jax.jit(sample_latents, static_argnames=("model", "sampler"))


def generate(
    params: Params,
    model: DiTConfig,
    world: World,
    prompts: Sequence[str],
    *,
    latent_shape: tuple[int, int, int],
    sampler: SamplerConfig,
    seed: int = 0,
    batch_size: int = 48,
    progress: str = "",
) -> Float[np.ndarray, "B F H W 3"]:
    """One video in [-1, 1] for each prompt. `progress` names a bar with the time left; empty for none.

    Raises ValueError for prompts that the world's text encoder does not know.
    """
    text = world.encode_text(prompts)
    size = min(batch_size, len(prompts))
    shape = (sampler.noises, *latent_shape, model.out_channels)
    videos = []
    starts = range(0, len(prompts), size)
    for start in tqdm(starts, desc=progress, unit="batch", disable=not progress, leave=False):
        rows = np.arange(start, start + size)  # the last batch is filled up, so that it needs no other program
        noise = draw_noise(seed, rows, shape)
        latents = _sample_latents(
            params, text[np.minimum(rows, len(prompts) - 1)], world.null_text, noise, model=model, sampler=sampler
        )
        videos.append(world.decode(latents))
    return np.concatenate(videos)[: len(prompts)]
