"""How published scores were sampled: what Wan's networks are sampled with where the caller does not say."""

from collections.abc import Mapping
from typing import Any

from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.sampling.schedules import MIDDLE, SIGMA_MAX
from rcm_jax.worlds.wan.negative import PROMPT

FRAMES, STEPS = 81, 4
TEACHER = {"num_steps": 50, "negative_prompt": PROMPT}
BIDIRECTIONAL = {"sampler": "euler", "guidance_scale": 5.0, "shift": 5.0}
CAUSAL = {"guidance_scale": 3.0, "shift": 3.0}
OF_A_SCHEDULE = ("steps_per_chunk", "middle")  # of a causal file that says how its student was trained


def with_protocol(pipe: Pipeline, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a call: those that are given, and where they are silent the published ones.

    A student: sigma_max 1600 and between it and the data 15/16, 5/6 and 5/8, of which n steps take the first n - 1; a
    causal one keeps the schedule that its file says. A teacher: 50 Euler steps with guidance from Wan's negative text.
    The built-in world has no protocol.
    """
    if pipe.world.small:
        return dict(given)
    return {"num_frames": FRAMES} | (_student if pipe.info.kind == "student" else _teacher)(pipe, given) | dict(given)


def _teacher(pipe: Pipeline, given: Mapping[str, Any]) -> dict[str, Any]:
    return TEACHER | (CAUSAL if pipe.causal else BIDIRECTIONAL)


def _student(pipe: Pipeline, given: Mapping[str, Any]) -> dict[str, Any]:
    if pipe.causal:  # whose times between are the published ones unless its file says others
        return {} if any(name in pipe.info.causal for name in OF_A_SCHEDULE) else {"sigma_max": SIGMA_MAX}
    if given.get("mid_t") is not None:  # the steps are as many as these need
        return {"sigma_max": SIGMA_MAX}
    steps = STEPS if given.get("num_steps") is None else given["num_steps"]
    return {"sigma_max": SIGMA_MAX, "num_steps": steps, "mid_t": MIDDLE[: max(0, steps - 1)]}
