"""Networks bound to a batch as velocities: what differs between a bidirectional and a causal student.

`Bidirectional` gives a network text and, for image-to-video, condition and image. `Causal` adds the context; the scores
of self forcing see whole videos, so it binds them bidirectionally.
"""

import dataclasses
import enum
import functools
import math
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from rcm_jax.causal.network import CausalDiT
from rcm_jax.data.batch import Batch
from rcm_jax.flow import RF, TRIG, Form, rf_noisy, rf_to_trig, trig_denoiser, trig_noisy
from rcm_jax.losses.forcing import over_frames
from rcm_jax.losses.samples import Terms
from rcm_jax.objectives.config import WHOLE, CausalConfig, TimeRange
from rcm_jax.objectives.draws import Draws
from rcm_jax.sampling.few_step import fixed_simulation_times, simulate, simulation_times
from rcm_jax.sampling.rollout import given_noises
from rcm_jax.sampling.self_rollout import self_rollout
from rcm_jax.types import Latents, Params, Text, Velocity
from rcm_jax.wan.dit import DiT, guided_velocity, velocity

NullText = Float[Array, "L D"] | Text  # the unconditional text: one for all videos, or one a video


class Role(enum.Enum):
    """What a network is asked for. `TANGENT` is the student where it is only called under `jax.jvp`."""

    STUDENT = "student"
    TANGENT = "student under jvp"
    TEACHER = "teacher"
    FAKE_SCORE = "fake score"
    SCORE_TEACHER = "score teacher"


class Binder(Protocol):
    """`form` is that of the student's sampler, and so of distribution matching."""

    form: Form
    null_text: NullText

    def bind(self, params: Params, batch: Batch, role: Role, draws: Draws) -> Velocity: ...

    def own_video(
        self, params: Params, batch: Batch, draws: Draws, num_steps: Int[Array, ""] | int
    ) -> tuple[Latents, Terms]:
        """The student's video after so many steps of its sampler, and the fields of its last step, through which alone
        the gradient goes: its input `G_xt`, and where the samples have times of their own its time `G_time`."""
        ...


class Sizes(NamedTuple):
    """The networks of a run, which may differ in size: the student's, its teacher's, and that of the scores, true and
    fake."""

    student: DiT
    teacher: DiT
    score: DiT

    def of(self, role: Role) -> DiT:
        if role is Role.TEACHER:
            return self.teacher
        return self.score if role in (Role.FAKE_SCORE, Role.SCORE_TEACHER) else self.student

    @classmethod
    def all(cls, dit: DiT) -> "Sizes":
        """One size for all."""
        return cls(dit, dit, dit)


def fused_under_jvp(dit: DiT) -> DiT:
    """Attention's value and tangent from one kernel."""
    return dit.clone(attend=functools.partial(dit.attend, fused=True))


@dataclasses.dataclass(frozen=True)
class Bidirectional:
    """Binds networks that see the whole video. `fused` is for `Role.TANGENT`. `t_range`: the RF times that the student
    serves; what serves those above is not there."""

    sizes: Sizes
    null_text: NullText
    guidance: float
    fused: bool = False
    form: Form = TRIG
    t_range: TimeRange = WHOLE

    def bind(self, params: Params, batch: Batch, role: Role, draws: Draws) -> Velocity:
        given, dit = {"condition": batch.condition, "image": batch.image}, self.sizes.of(role)
        if role in (Role.TEACHER, Role.SCORE_TEACHER):
            return guided_velocity(dit, params, batch.text, self.null_text, self.guidance, **given)
        fused = self.fused and role is Role.TANGENT
        return velocity(fused_under_jvp(dit) if fused else dit, params, batch.text, **given)

    def own_video(
        self, params: Params, batch: Batch, draws: Draws, num_steps: Int[Array, ""] | int
    ) -> tuple[Latents, Terms]:
        """Backward simulation (rCM, arXiv 2510.08431). Of a student that does not begin at pure noise it begins with
        the batch's videos, noised as far as the student goes."""
        noises, end = draws.simulation_noises, self.t_range[1]
        if draws.simulation_t is None:
            times = fixed_simulation_times(noises.shape[1], self.t_range)[: len(noises)]
        else:
            times = simulation_times(rf_to_trig(draws.simulation_t), math.atan2(end, 1 - end))
        start = noises[0] if end == 1 else trig_noisy(batch.latents, noises[0], times[0])
        fixed, student = (
            trig_denoiser(self.bind(p, batch, Role.STUDENT, draws)) for p in (stop_gradient(params), params)
        )
        z, theta = simulate(fixed, start, times, noises[1:], num_steps)
        return student(z, theta), {"G_xt": z, "G_time": theta}


@dataclasses.dataclass(frozen=True)
class Causal:
    """Binds causal networks to their context; scores see whole videos, under `score_guidance`.

    `forced`: the student sees context of its own; without, a chunk sees the noisy ones before it (diffusion forcing).
    """

    sizes: Sizes
    null_text: NullText
    guidance: float
    settings: CausalConfig
    fused: bool = False
    forced: bool = True
    form: Form = RF

    def network(self, batch: Batch, role: Role = Role.STUDENT) -> CausalDiT:
        if batch.condition is not None or batch.image is not None:
            raise ValueError(
                "a causal network's image is its first latent frame: batch.condition and batch.image must be None"
            )
        return self.settings.network(self.sizes.of(role), batch.latents.shape[1:4])

    def bind(self, params: Params, batch: Batch, role: Role, draws: Draws) -> Velocity:
        if role in (Role.FAKE_SCORE, Role.SCORE_TEACHER):
            whole = Bidirectional(self.sizes, self.null_text, self.settings.score_guidance)
            return whole.bind(params, batch, role, draws)
        network = self.network(batch, role)
        if role is Role.TEACHER:  # on a clean context whatever the student sees
            return network.guided_forced_velocity(params, batch.text, self.null_text, self.guidance, batch.latents)
        if not self.forced:
            return network.velocity(params, batch.text)
        if self.fused and role is Role.TANGENT:
            network = dataclasses.replace(network, dit=fused_under_jvp(network.dit))
        return network.forced_velocity(params, batch.text, *self.context(batch, draws))

    def context(self, batch: Batch, draws: Draws) -> tuple[Latents, Float[Array, "B T"]]:
        """The student's context and its times: clean, or noised to the last time of each chunk with noisy context."""
        x0 = batch.latents
        spans, schedule = self.network(batch).pattern.spans(x0.shape[1]), self.settings.schedule(math.inf)
        last = [times[-2] if noisy else 0.0 for times, noisy in map(schedule.chunk, range(len(spans)))]
        t = over_frames(jnp.broadcast_to(jnp.asarray(last), (x0.shape[0], len(spans))), spans)
        return rf_noisy(x0, draws.context_noise, t) if any(last) else x0, t

    def own_video(
        self, params: Params, batch: Batch, draws: Draws, num_steps: Int[Array, ""] | int
    ) -> tuple[Latents, Terms]:
        """Self forcing (arXiv 2506.08009)."""
        network = self.network(batch)
        video, last_input = self_rollout(
            network, params, batch.text, given_noises(draws.simulation_noises, network.pattern),
            self.settings.schedule(math.inf), num_steps, frames=batch.latents.shape[1], replay=self.settings.replay,
        )  # fmt: skip
        return video, {"G_xt": last_input}
