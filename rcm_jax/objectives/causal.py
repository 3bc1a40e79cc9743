"""What causal training minimises (arXiv 2606.25473): the three losses of `objective.py` for a causal network.

`diffusion` is teacher forcing or diffusion forcing; `student` teacher-forced consistency and self-forced distribution
matching together; `fake_score` the critic of the latter. All in rectified flow.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.flow import rf_denoiser, rf_noisy
from rcm_jax.losses.consistency import dcm_loss, dcm_times, rf_scm_loss
from rcm_jax.losses.diffusion import flow_matching_loss
from rcm_jax.losses.distribution import dmd_loss
from rcm_jax.losses.forcing import df_times, forcing_loss, over_frames
from rcm_jax.objectives.bidirectional import (
    Batch,
    consistency_metrics,
    draw_D,
    drop_text,
    fused_under_jvp,
    masked_mean,
    warmup_ratio,
    with_distribution,
)
from rcm_jax.objectives.config import CausalConfig, MethodConfig
from rcm_jax.sampling.rollout import given_noises
from rcm_jax.sampling.self_rollout import self_rollout
from rcm_jax.training.schedule import fake_updates, simulation_steps, student_updates
from rcm_jax.types import Latents, Metrics, Params, Text
from rcm_jax.wan.causal import CausalDiT
from rcm_jax.wan.dit import DiT, guided_velocity, velocity


@dataclasses.dataclass(frozen=True)
class CausalObjective:
    """The losses of a causal network. `frozen` holds the parameters of the networks that stand still."""

    dit: DiT
    null_text: Float[Array, "L D"]
    method: MethodConfig
    causal: CausalConfig

    def network(self, x0: Latents) -> CausalDiT:
        return self.causal.network(self.dit, x0.shape[1:4])

    def context(self, network: CausalDiT, x0: Latents, key: Array) -> tuple[Latents, Float[Array, "B T"]]:
        """The student's context and its times: clean, or noised to the last time of each chunk with noisy context."""
        spans, schedule = network.pattern.spans(x0.shape[1]), self.causal.schedule(math.inf)
        last = [times[-2] if noisy else 0.0 for times, noisy in map(schedule.chunk, range(len(spans)))]
        t = over_frames(jnp.broadcast_to(jnp.asarray(last), (x0.shape[0], len(spans))), spans)
        return rf_noisy(x0, jax.random.normal(key, x0.shape), t) if any(last) else x0, t

    def consistency(
        self, network: CausalDiT, params: Params, teacher: Params, batch: Batch, key: Array, step: Array
    ) -> tuple[Float[Array, " B"], Metrics]:
        """`tf_scm` or `tf_dcm`; the teacher always sees clean context."""
        method, x0, text = self.method, batch["latents"], batch["text"]
        key_time, key_noise, key_context = jax.random.split(key, 3)
        noise = jax.random.normal(key_noise, x0.shape)
        context = self.context(network, x0, key_context)
        moving = method.fused_tangent and method.consistency == "rf_scm"
        forced = dataclasses.replace(network, dit=fused_under_jvp(self.dit)) if moving else network
        student = forced.forced_velocity(params, text, *context)
        teacher = network.guided_forced_velocity(teacher, text, self.null_text, method.guidance, x0)
        if method.consistency == "dcm":
            u = jax.random.uniform(key_time, x0.shape[:1]) * (1 - method.dcm_skip / method.dcm_total_steps)
            times = dcm_times(u, total_steps=method.dcm_total_steps, skip=method.dcm_skip, shift=method.dcm_shift)
            scale = method.consistency_scale / math.prod(x0.shape[2:])  # the mean of a frame, the sum over frames
            loss, terms = dcm_loss(rf_denoiser(student), teacher, x0, noise, times, scale=scale, noisy=rf_noisy)
        else:
            t = method.p_G.build().sample(key_time, x0.shape[:1])
            warmup = warmup_ratio(method, step)
            loss, terms = rf_scm_loss(student, teacher, x0, noise, t, warmup=warmup, scale=method.consistency_scale)
        return loss, consistency_metrics(loss, terms)

    def rolled_out(
        self, network: CausalDiT, params: Params, text: Text, shape: tuple[int, ...], key: Array, steps: Array
    ) -> Latents:
        """The student's own video after that many simulated steps a chunk."""
        count = max(self.causal.steps_per_chunk) + 1
        noises = given_noises(jax.random.normal(key, (count, *shape)), network.pattern)
        schedule = self.causal.schedule(math.inf)
        return self_rollout(
            network, params, text, noises, schedule, steps, frames=shape[1], replay=self.causal.replay
        )[0]  # fmt: skip

    def student(
        self, params: Params, frozen: dict[str, Params], batch: Batch, key: Array, step: Array, with_dmd: bool
    ) -> tuple[Float[Array, ""], Metrics]:
        """Mean over the batch of the consistency loss plus, `with_dmd`, dmd_scale times the distribution loss."""
        key_consistency, key_simulate, key_D = jax.random.split(key, 3)
        method, x0, text = self.method, batch["latents"], batch["text"]
        network, loss, metrics = self.network(x0), jnp.zeros(x0.shape[0]), {}
        if method.uses_consistency:
            loss, metrics = self.consistency(network, params, frozen["teacher"], batch, key_consistency, step)
        if with_dmd:
            count = simulation_steps(method, student_updates(method, step))
            video = self.rolled_out(network, params, text, x0.shape, key_simulate, count)
            fake = rf_denoiser(velocity(self.dit, frozen["fake_score"], text))
            score = guided_velocity(
                self.dit, frozen["score_teacher"], text, self.null_text, self.causal.score_guidance
            )  # fmt: skip
            draws = draw_D(method, x0.shape, key_D)
            distribution = dmd_loss(video, fake, rf_denoiser(score), *draws, noisy=rf_noisy)
            loss, metrics = with_distribution(method, loss, metrics, *distribution)
        return loss.mean(), metrics

    def fake_score(
        self, params: Params, frozen: dict[str, Params], batch: Batch, key: Array, step: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """Flow matching of the fake score on videos of the student."""
        key_simulate, key_D = jax.random.split(key)
        method, x0, text = self.method, batch["latents"], batch["text"]
        count = simulation_steps(method, fake_updates(method, step))
        video = self.rolled_out(self.network(x0), frozen["student"], text, x0.shape, key_simulate, count)
        video = jax.lax.stop_gradient(video)
        loss = flow_matching_loss(velocity(self.dit, params, text), video, *draw_D(method, x0.shape, key_D))
        masked = ~jnp.isfinite(loss)
        return jnp.where(masked, 0, loss).mean(), {"loss_critic": masked_mean(loss, masked), "masked": masked.sum()}

    def diffusion(self, params: Params, batch: Batch, key: Array) -> tuple[Float[Array, ""], Metrics]:
        """Teacher forcing, one time a video; or diffusion forcing, one time a chunk. Text is dropped for a part."""
        key_time, key_noise, key_drop, key_context = jax.random.split(key, 4)
        method, x0 = self.method, batch["latents"]
        text = drop_text(batch["text"], self.null_text, method.text_dropout, key_drop)
        noise, sampler, network = jax.random.normal(key_noise, x0.shape), method.p_G.build(), self.network(x0)
        if self.causal.forcing == "tf":
            student = network.forced_velocity(params, text, *self.context(network, x0, key_context))
            t = sampler.sample(key_time, x0.shape[:1])
        else:
            student = network.velocity(params, text)
            spans = network.pattern.spans(x0.shape[1])
            t = df_times(self.causal.df_times, sampler, key_time, x0.shape[0], spans)
        loss, _ = forcing_loss(student, x0, noise, t, weighting=self.causal.weighting, scale=method.consistency_scale)
        return loss.mean(), {"loss_diffusion": loss.mean()}
