"""A whole sampler as data: the student's few steps, or a solver and its schedule."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.sampling.few_step import MIDDLE, few_step_times, sample_few_step
from rcm_jax.sampling.ode import rcm_times, sample_ode, wan_times
from rcm_jax.types import Latents, Velocity

SAMPLERS = ("few_step", "euler", "unipc", "dpm++", "wan_unipc", "wan_dpm++")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to sample. `few_step` is the student's sampler; the others are ODE solvers with guidance. middle: RF times
    between a student's first step and the data, the first num_steps - 1 of which are used (default: rCM's three).

    euler, unipc and dpm++ use rCM's real-valued times, wan_unipc and wan_dpm++ the official Wan2.1 ones (integer
    model times).
    """

    name: str = "few_step"
    num_steps: int = 4
    sigma_max: float = 80.0
    guidance: float = 5.0
    shift: float = 5.0
    middle: tuple[float, ...] | None = None

    @property
    def noises(self) -> int:
        """How many arrays of noise a video takes: a student's sampler draws fresh noise at every step."""
        return self.num_steps if self.name == "few_step" else 1

    @property
    def guided(self) -> bool:
        """Whether a step asks the network twice, with the text and without."""
        return self.name != "few_step" and self.guidance > 1

    @property
    def passes(self) -> int:
        """Evaluations of the network for a video."""
        return self.num_steps * (2 if self.guided else 1)

    @property
    def angles(self) -> tuple[float, ...]:
        """`middle` as TrigFlow times."""
        return MIDDLE if self.middle is None else tuple(math.atan2(t, 1 - t) for t in self.middle)

    def __post_init__(self):
        if self.name not in SAMPLERS:
            raise ValueError(f"sampler {self.name!r} is unknown; use one of {SAMPLERS}")
        if self.name == "few_step":  # its errors, before anything is compiled
            times = few_step_times(self.num_steps, self.sigma_max, self.angles)
            if not all(later < t for t, later in itertools.pairwise(times)):
                raise ValueError(f"times {tuple(times.round(4).tolist())} must fall from at most 1 to 0")
        elif self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1")


def run_sampler(
    sampler: SamplerConfig, network: Velocity, noise: Float[Array, "B n T H W C"], loop: Callable = jax.lax.scan
) -> Latents:
    """Latents of one batch from a velocity, guided where it should be. noise: the start, then one for each further
    few-step step. `loop` runs the steps: see `sample_few_step`."""
    if sampler.name == "few_step":
        return sample_few_step(
            network, noise[:, 0], step_noises=jnp.moveaxis(noise[:, 1:], 1, 0), num_steps=sampler.num_steps,
            sigma_max=sampler.sigma_max, middle=sampler.angles, loop=loop,
        )  # fmt: skip
    solver = sampler.name.removeprefix("wan_")
    if sampler.name.startswith("wan_"):
        schedule = wan_times(sampler.num_steps, sampler.shift, solver=solver)
    else:
        schedule = rcm_times(sampler.num_steps, sampler.shift)
    return sample_ode(network, noise[:, 0], schedule=schedule, solver=solver, loop=loop)
