"""What bidirectional training minimises: the losses of the paper, put together for one batch.

`student` is the consistency and the distribution loss together, `fake_score` the critic's, `diffusion` a teacher's.
Noise and times come from the key. `causal_objective.py` has the same three for causal networks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.flow import rf_to_trig, trig_denoiser, trig_velocity
from rcm_jax.losses.consistency import dcm_loss, dcm_times, rf_scm_loss, scm_loss
from rcm_jax.losses.diffusion import flow_matching_loss
from rcm_jax.losses.distribution import critic_loss, dmd_loss, fixed_simulation_times, simulate, simulation_times
from rcm_jax.objectives.config import MethodConfig
from rcm_jax.training.schedule import fake_updates, simulation_steps, student_updates
from rcm_jax.types import Latents, Metrics, Params, Text, Velocity
from rcm_jax.wan.dit import DiT, guided_velocity, velocity

Batch = dict[str, Array]  # latents [B, T, H, W, C], text [B, L, D]


def masked_mean(values: Float[Array, " B"], masked: Array) -> Float[Array, ""]:
    """Mean over the samples that count, for the log."""
    return jnp.where(masked, 0, values).sum() / jnp.maximum((~masked).sum(), 1)


def warmup_ratio(method: MethodConfig, step: Array) -> Array:
    """r = min(1, step / tangent_warmup), 1 without a warm-up."""
    return jnp.minimum(1.0, step / method.tangent_warmup) if method.tangent_warmup else jnp.ones(())


def drop_text(text: Text, null_text: Float[Array, "L D"], part: float, key: Array) -> Text:
    """`part` of the texts made unconditional."""
    dropped = jax.random.bernoulli(key, part, text.shape[:1])
    return jnp.where(dropped[:, None, None], null_text[None], text)


def draw_D(method: MethodConfig, shape: tuple[int, ...], key: Array) -> tuple[Latents, Array]:
    """Noise and RF time at which the scores compare a video."""
    key_time, key_noise = jax.random.split(key)
    return jax.random.normal(key_noise, shape), method.p_D.build().sample(key_time, shape[:1])


def consistency_metrics(loss: Float[Array, " B"], terms: Metrics) -> Metrics:
    """What the log says of a consistency loss."""
    metrics = {"loss_consistency": masked_mean(loss, terms["masked"]), "masked": terms["masked"].sum()}
    if "g_norm" in terms:
        metrics["tangent_norm"] = masked_mean(terms["g_norm"], terms["masked"])
    return metrics


def with_distribution(
    method: MethodConfig, loss: Float[Array, " B"], metrics: Metrics, dmd: Float[Array, " B"], terms: Metrics
) -> tuple[Float[Array, " B"], Metrics]:
    """The consistency loss plus dmd_scale times the distribution loss, and the metrics of both."""
    masked = metrics.get("masked", 0) + terms["masked"].sum()
    logged = metrics | {"loss_dmd": masked_mean(dmd, terms["masked"]), "masked": masked}
    return loss + method.dmd_scale * dmd, logged


def consistency_term(
    method: MethodConfig, student: Velocity, teacher: Velocity, x0: Latents, key: Array, warmup: Array
) -> tuple[Float[Array, " B"], Metrics]:
    """sCM, its RF form or dCM, with times and noise drawn from `key`."""
    key_time, key_noise = jax.random.split(key)
    batch = x0.shape[:1]
    noise = jax.random.normal(key_noise, x0.shape)
    if method.consistency == "dcm":
        u = jax.random.uniform(key_time, batch) * (1 - method.dcm_skip / method.dcm_total_steps)
        times = dcm_times(u, total_steps=method.dcm_total_steps, skip=method.dcm_skip, shift=method.dcm_shift)
        loss, terms = dcm_loss(
            trig_denoiser(student), trig_velocity(teacher), x0, noise, rf_to_trig(times), scale=method.consistency_scale
        )
    else:
        t = method.p_G.build().sample(key_time, batch)
        if method.consistency == "scm":
            pair, time, function = (trig_velocity(student), trig_velocity(teacher)), rf_to_trig(t), scm_loss
        else:
            pair, time, function = (student, teacher), t, rf_scm_loss
        loss, terms = function(*pair, x0, noise, time, warmup=warmup, scale=method.consistency_scale)
    return loss, consistency_metrics(loss, terms)


def simulated_input(
    method: MethodConfig, student: Velocity, shape: tuple[int, ...], key: Array, num_steps: Array
) -> tuple[Latents, Array]:
    """Backward simulation: the student sampler's state before its last of `num_steps` steps, and that step's theta."""
    key_start, key_draws, key_steps = jax.random.split(key, 3)
    n = method.max_simulation_steps
    if method.dmd_fixed_times:
        times = fixed_simulation_times(shape[0])[:n]
    else:
        times = simulation_times(rf_to_trig(method.p_D.build().sample(key_draws, (n - 1, shape[0]))))
    start = jax.random.normal(key_start, shape)
    step_noises = jax.random.normal(key_steps, (n - 1, *shape))
    return simulate(trig_denoiser(student), start, times, step_noises, num_steps)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The losses of a bidirectional network. `frozen` holds the parameters of the networks that stand still."""

    dit: DiT
    null_text: Float[Array, "L D"]
    method: MethodConfig

    # --- the networks bound to a batch's text, as velocities --------------------------------------------------------

    def plain(self, params: Params, text: Text) -> Velocity:
        return velocity(self.dit, params, text)

    def under_jvp(self, params: Params, text: Text) -> Velocity:
        """For a function that is only called under `jax.jvp`: attention's value and tangent from one kernel."""
        return velocity(fused_under_jvp(self.dit), params, text)

    def teacher(self, params: Params, text: Text) -> Velocity:
        return guided_velocity(self.dit, params, text, self.null_text, self.method.guidance)

    # --- the losses -------------------------------------------------------------------------------------------------

    def student(
        self, params: Params, frozen: dict[str, Params], batch: Batch, key: Array, step: Array, with_dmd: bool
    ) -> tuple[Float[Array, ""], Metrics]:
        """Mean over the batch of the consistency loss plus, `with_dmd`, dmd_scale times the distribution loss."""
        key_consistency, key_simulate, key_D = jax.random.split(key, 3)
        method, x0, text = self.method, batch["latents"], batch["text"]
        student, teacher = self.plain(params, text), self.teacher(frozen["teacher"], text)
        loss, metrics = jnp.zeros(x0.shape[0]), {}
        if method.uses_consistency:
            moving = self.under_jvp(params, text) if method.fused_tangent and method.consistency != "dcm" else student
            loss, metrics = consistency_term(method, moving, teacher, x0, key_consistency, warmup_ratio(method, step))
        if with_dmd:
            count = simulation_steps(method, student_updates(method, step))
            no_gradient = self.plain(jax.lax.stop_gradient(params), text)
            z, theta = simulated_input(method, no_gradient, x0.shape, key_simulate, count)
            video = trig_denoiser(student)(z, theta)
            fake = trig_denoiser(self.plain(frozen["fake_score"], text))
            noise, t = draw_D(method, x0.shape, key_D)
            distribution = dmd_loss(video, fake, trig_denoiser(teacher), noise, rf_to_trig(t))
            loss, metrics = with_distribution(method, loss, metrics, *distribution)
        return loss.mean(), metrics

    def fake_score(
        self, params: Params, frozen: dict[str, Params], batch: Batch, key: Array, step: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """The critic's loss on videos of the student."""
        key_simulate, key_D = jax.random.split(key)
        method, shape, text = self.method, batch["latents"].shape, batch["text"]
        student = self.plain(frozen["student"], text)
        count = simulation_steps(method, fake_updates(method, step))
        video = trig_denoiser(student)(*simulated_input(method, student, shape, key_simulate, count))
        noise, t = draw_D(method, shape, key_D)
        loss, terms = critic_loss(video, trig_denoiser(self.plain(params, text)), noise, rf_to_trig(t))
        return loss.mean(), {"loss_critic": masked_mean(loss, terms["masked"]), "masked": terms["masked"].sum()}

    def diffusion(self, params: Params, batch: Batch, key: Array) -> tuple[Float[Array, ""], Metrics]:
        """Flow matching with the text dropped for a part of the samples: guidance needs an unconditional network.

        `frame_times` of the samples get an own time for each latent frame, rising from the first to the last: the
        later frames must be foretold from the earlier ones, which takes the direction of motion. Under one noise level
        a frame is best told from its neighbours on both sides, and the network stays blind to which way time runs.
        """
        key_time, key_noise, key_drop, key_frames = jax.random.split(key, 4)
        method, x0 = self.method, batch["latents"]
        text = drop_text(batch["text"], self.null_text, method.text_dropout, key_drop)
        t = method.p_G.build().sample(key_time, x0.shape[:1])
        if method.frame_times:
            key_pick, key_draw = jax.random.split(key_frames)
            own = jax.random.bernoulli(key_pick, method.frame_times, x0.shape[:1])
            rising = jnp.sort(method.p_G.build().sample(key_draw, x0.shape[:2]), axis=1)
            t = jnp.where(own[:, None], rising, t[:, None])
        loss = flow_matching_loss(self.plain(params, text), x0, jax.random.normal(key_noise, x0.shape), t)
        return loss.mean(), {"loss_diffusion": loss.mean()}


def fused_under_jvp(dit: DiT) -> DiT:
    return dit.clone(attend=functools.partial(dit.attend, fused=True))
