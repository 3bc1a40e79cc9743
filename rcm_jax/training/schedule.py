"""What a training step does: functions of the step alone, so that a resumed run cannot disagree with itself.

For step < tangent_warmup the student learns from consistency alone. After it the student updates (both losses) at
every student_update_freq-th step and the fake score at all others. The number of simulated sampler steps cycles with
the count of updates of the network being trained.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.objectives.config import MethodConfig


def step_name(config: MethodConfig, step: int) -> str:
    """Which of `make_steps`'s functions a step runs."""
    if config.name == "diffusion":
        return "diffusion"
    if not is_student_step(config, step):
        return "critic"
    return "student_dmd" if uses_dmd_at(config, step) else "student"


def step_names(config: MethodConfig) -> tuple[str, ...]:
    """All that `step_name` can say of a run, in the order in which they come."""
    if config.name == "diffusion":
        return ("diffusion",)
    if not config.uses_dmd:
        return ("student",)
    return (*(("student",) if config.tangent_warmup else ()), "student_dmd", "critic")


def is_student_step(config: MethodConfig, step: int) -> bool:
    if not config.uses_dmd or step < config.tangent_warmup:
        return True
    return (step - config.tangent_warmup) % config.student_update_freq == 0


def uses_dmd_at(config: MethodConfig, step: int) -> bool:
    """Whether a student step has the distribution loss too."""
    return config.uses_dmd and step >= config.tangent_warmup


def student_updates(config: MethodConfig, step):
    """Student updates made before `step` (an int or a traced integer)."""
    if not config.uses_dmd:
        return step
    late = step - config.tangent_warmup
    after = config.tangent_warmup + -(-late // config.student_update_freq)
    return step + (after - step) * (late > 0)


def critic_updates(config: MethodConfig, step):
    """Fake-score updates made before `step`."""
    return step - student_updates(config, step)


def simulation_steps(config: MethodConfig, updates):
    """How many sampler steps the backward simulation has: 1, 2, …, max, 1, … with the updates of that network."""
    return updates % config.max_simulation_steps + 1


def warmup_ratio(config: MethodConfig, step: Array) -> Float[Array, ""]:
    """r = min(1, step / tangent_warmup) of the consistency losses, 1 without a warm-up."""
    return jnp.minimum(1.0, step / config.tangent_warmup) if config.tangent_warmup else jnp.ones(())
