"""How a network is sampled: what its file says, with what the caller changes. Arguments of the other kind of network or
of sampling are errors."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rcm_jax.errors import ArgumentError
from rcm_jax.model_file import ModelInfo
from rcm_jax.objectives.config import CausalConfig
from rcm_jax.options import times
from rcm_jax.pipelines.options import SamplingOptions
from rcm_jax.sampling.noise_control import PUBLISHED, InputNoise
from rcm_jax.sampling.sampler import SamplerConfig
from rcm_jax.sampling.schedules import MIDDLE, RolloutSchedule, few_step_schedule, ode_schedule


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def sampler_from(options: SamplingOptions, info: ModelInfo) -> SamplerConfig:
    """Of a bidirectional network: a student in 4 steps, a teacher by UniPC in 50 with guidance, or as told."""
    student = info.kind == "student"
    others = ("sampler", "guidance_scale", "negative_prompt", "shift") if student else ("sigma_max", "mid_t")
    for name in others:
        if getattr(options, name) is not None:
            raise ArgumentError(
                f"{{{name}}} does not apply: the network is a {info.kind}; {{kind}} overrules that",
                **{name: None, "kind": None},
            )  # fmt: skip
    own = (
        SamplerConfig("few_step", 4, info.sigma_max) if student else SamplerConfig("unipc", 50, guidance=info.guidance)
    )
    asked = _given(
        name=options.sampler, num_steps=options.num_steps, sigma_max=options.sigma_max,
        guidance=options.guidance_scale, shift=options.shift,
    )  # fmt: skip
    if options.mid_t is not None:
        asked["middle"] = times(options.mid_t, "mid_t")
        asked.setdefault("num_steps", len(asked["middle"]) + 1)
    return dataclasses.replace(own, **asked)


def schedule_from(options: SamplingOptions, info: ModelInfo) -> RolloutSchedule:
    """Of a causal network: a student as it was trained, a teacher in 50 Euler steps with guidance, or as told."""
    distilled = info.kind == "student"
    others = ("guidance_scale", "shift") if distilled else ("mid_t", "steps_per_chunk", "mid_t_schedules")
    for name in others:
        if getattr(options, name) is not None:
            kinds = "an ODE; the network is sampled in few steps" if distilled else "few-step sampling, of a student"
            raise ArgumentError(f"{{{name}}} is for {kinds}; {{kind}} overrules that", **{name: None, "kind": None})
    sigma_max = info.sigma_max if options.sigma_max is None else options.sigma_max
    if distilled:
        schedule = _few_step(options, CausalConfig(**info.causal), sigma_max)
    else:
        asked = _given(num_steps=options.num_steps, shift=options.shift)
        guidance = info.guidance if options.guidance_scale is None else options.guidance_scale
        schedule = ode_schedule(**asked, guidance=guidance, sigma_max=sigma_max)
    schedule = _with_context(options, schedule)
    return schedule if options.image_path is None else schedule.after_image()


def input_noise(options: SamplingOptions, info: ModelInfo) -> InputNoise:
    """Of input video. Raises ArgumentError for times that would not fall to 0, and for those of `published` beside
    others."""
    how = InputNoise(**_given(scale=options.noise_scale, rule=options.noise_rule, steps=options.num_steps))
    if how.rule == PUBLISHED:
        if info.kind != "student":
            raise ArgumentError(
                "{noise_rule} is few-step sampling, of a student; {kind} overrules that", noise_rule=how.rule, kind=None
            )
        for name in ("mid_t", "steps_per_chunk", "mid_t_schedules", "sigma_max"):
            if getattr(options, name) is not None:
                raise ArgumentError(
                    f"{{{name}}} does not apply: {{noise_rule}} has times of its own", **{name: None},
                    noise_rule=how.rule,
                )  # fmt: skip
    if how.scale <= how.lowest:
        raise ArgumentError(
            f"{{noise_scale}} must be above {how.lowest:g} with {{noise_rule}}", noise_scale=how.scale,
            noise_rule=how.rule,
        )  # fmt: skip
    return how


def _few_step(options: SamplingOptions, own: CausalConfig, sigma_max: float) -> RolloutSchedule:
    """The file's own schedule; other steps are for all chunks alike, between the published times unless given."""
    steps, lists = options.steps_per_chunk, options.mid_t_schedules
    if lists is not None and steps is None:
        raise ArgumentError(
            "{mid_t_schedules} needs {steps_per_chunk}: one list of times an entry", mid_t_schedules=None,
            steps_per_chunk=None,
        )  # fmt: skip
    mine = own.schedule(sigma_max)
    if steps is None and options.mid_t is None and options.num_steps in (None, own.steps_per_chunk[-1]):
        return mine
    middle = MIDDLE if options.mid_t is None else times(options.mid_t, "mid_t")
    if steps is None:
        steps = [len(middle) + 1 if options.num_steps is None else options.num_steps]
    asked = few_step_schedule(steps, middle=middle, middle_by_entry=_lists(lists), sigma_max=sigma_max)
    return dataclasses.replace(mine, times=asked.times)


def _lists(value: str | Sequence[Sequence[float]] | None) -> list[tuple[float, ...]] | None:
    if value is None:
        return None
    return [times(entry, "mid_t_schedules") for entry in (value.split(";") if isinstance(value, str) else value)]


def _with_context(options: SamplingOptions, schedule: RolloutSchedule) -> RolloutSchedule:
    """Whether, and from which chunk on, the last step gives the cache its keys."""
    asked, start = options.context_from_last_step, options.context_from_last_step_start_chunk
    if start is not None and not asked:
        raise ArgumentError(
            "{context_from_last_step_start_chunk} needs {context_from_last_step}",
            context_from_last_step_start_chunk=None, context_from_last_step=None,
        )  # fmt: skip
    if asked is None:
        return schedule
    return dataclasses.replace(schedule, noisy_context_from=(start or 0) if asked else None)
