"""Which network a training step updates: functions of the step alone, so a resumed run cannot disagree with itself.

For step < tangent_warmup the student learns from consistency alone. After it the student updates (both losses) at
every student_update_freq-th step and the fake score at all others. The number of simulated sampler steps cycles with
the count of updates of the network being trained.
"""

from rcm_jax.objectives.config import MethodConfig


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


def fake_updates(config: MethodConfig, step):
    """Fake-score updates made before `step`."""
    return step - student_updates(config, step)


def simulation_steps(config: MethodConfig, updates):
    """How many sampler steps the backward simulation has: 1, 2, …, max, 1, … with the updates of that network."""
    return updates % config.max_simulation_steps + 1
