"""One training step: the losses of the paper, put together and differentiated once.

A student step takes the gradients of the consistency and the distribution loss together; a critic step moves the fake
score; which of them a step is, `schedule.py` says. All functions are pure; noise comes from the state's (seed, step).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rcm_jax.flow import rf_to_trig, trig_denoiser, trig_velocity
from rcm_jax.kernels.attention import attention
from rcm_jax.losses.consistency import dcm_loss, dcm_times, rf_scm_loss, scm_loss
from rcm_jax.losses.diffusion import flow_matching_loss
from rcm_jax.losses.distribution import critic_loss, dmd_loss, fixed_simulation_times, simulate, simulation_times
from rcm_jax.training.config import MethodConfig, RunConfig
from rcm_jax.training.ema import ema_update, power_ema_beta, power_ema_exponent
from rcm_jax.training.optimizer import adamw
from rcm_jax.training.schedule import fake_updates, simulation_steps, student_updates
from rcm_jax.training.state import TrainState
from rcm_jax.types import Latents, Metrics, Params, Text, Velocity
from rcm_jax.wan.dit import DiT, guided_velocity, velocity

Batch = dict[str, Array]  # latents [B, T, H, W, C], text [B, L, D]
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks bound to one batch's text, as velocities."""

    dit: DiT
    null_text: Float[Array, "L D"]
    guidance: float

    def plain(self, params: Params, text: Text) -> Velocity:
        return velocity(self.dit, params, text)

    def under_jvp(self, params: Params, text: Text) -> Velocity:
        """For a function that is only called under `jax.jvp`: attention's value and tangent from one kernel."""
        return velocity(self.dit.clone(attend=functools.partial(self.dit.attend, fused=True)), params, text)

    def teacher(self, params: Params, text: Text) -> Velocity:
        return guided_velocity(self.dit, params, text, self.null_text, self.guidance)


def _mean(values: Float[Array, " B"], masked: Array) -> Float[Array, ""]:
    """Mean over the samples that count, for the log."""
    return jnp.where(masked, 0, values).sum() / jnp.maximum((~masked).sum(), 1)


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
    metrics = {"loss_consistency": _mean(loss, terms["masked"]), "masked": terms["masked"].sum()}
    if "g_norm" in terms:
        metrics["tangent_norm"] = _mean(terms["g_norm"], terms["masked"])
    return loss, metrics


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


def _draw_D(method: MethodConfig, shape: tuple[int, ...], key: Array) -> tuple[Latents, Array]:
    """Noise and theta at which the scores compare a video."""
    key_time, key_noise = jax.random.split(key)
    return jax.random.normal(key_noise, shape), rf_to_trig(method.p_D.build().sample(key_time, shape[:1]))


def student_loss(
    params: Params, frozen: dict[str, Params], networks: Networks, method: MethodConfig, batch: Batch, key: Array,
    step: Array, with_dmd: bool,
) -> tuple[Float[Array, ""], Metrics]:  # fmt: skip
    """Mean over the batch of the consistency loss plus, after the warm-up, dmd_scale times the distribution loss."""
    key_consistency, key_simulate, key_D = jax.random.split(key, 3)
    x0, text = batch["latents"], batch["text"]
    student, teacher = networks.plain(params, text), networks.teacher(frozen["teacher"], text)
    loss, metrics = jnp.zeros(x0.shape[0]), {}
    if method.uses_consistency:
        moving = networks.under_jvp(params, text) if method.fused_tangent and method.consistency != "dcm" else student
        warmup = jnp.minimum(1.0, step / method.tangent_warmup) if method.tangent_warmup else jnp.ones(())
        loss, metrics = consistency_term(method, moving, teacher, x0, key_consistency, warmup)
    if with_dmd:
        count = simulation_steps(method, student_updates(method, step))
        no_gradient = networks.plain(jax.lax.stop_gradient(params), text)
        z, theta = simulated_input(method, no_gradient, x0.shape, key_simulate, count)
        video = trig_denoiser(student)(z, theta)
        fake = trig_denoiser(networks.plain(frozen["fake_score"], text))
        dmd, terms = dmd_loss(video, fake, trig_denoiser(teacher), *_draw_D(method, x0.shape, key_D))
        loss = loss + method.dmd_scale * dmd
        metrics |= {
            "loss_dmd": _mean(dmd, terms["masked"]),
            "masked": metrics.get("masked", 0) + terms["masked"].sum(),
        }
    return loss.mean(), metrics


def fake_score_loss(
    params: Params, frozen: dict[str, Params], networks: Networks, method: MethodConfig, batch: Batch, key: Array,
    step: Array,
) -> tuple[Float[Array, ""], Metrics]:  # fmt: skip
    """The critic's loss on videos of the student."""
    key_simulate, key_D = jax.random.split(key)
    shape, text = batch["latents"].shape, batch["text"]
    student = networks.plain(frozen["student"], text)
    count = simulation_steps(method, fake_updates(method, step))
    video = trig_denoiser(student)(*simulated_input(method, student, shape, key_simulate, count))
    fake = trig_denoiser(networks.plain(params, text))
    loss, terms = critic_loss(video, fake, *_draw_D(method, shape, key_D))
    return loss.mean(), {"loss_critic": _mean(loss, terms["masked"]), "masked": terms["masked"].sum()}


def diffusion_loss(
    params: Params, networks: Networks, method: MethodConfig, batch: Batch, key: Array
) -> tuple[Float[Array, ""], Metrics]:
    """Flow matching with the text dropped for a part of the samples, so that guidance has its unconditional network.

    `frame_times` of the samples get an own time for each latent frame, rising from the first to the last: the later
    frames must be foretold from the earlier ones, which takes the direction of motion. Under one noise level a frame
    is best told from its neighbours on both sides, and the network stays blind to which way time runs.
    """
    key_time, key_noise, key_drop, key_frames = jax.random.split(key, 4)
    x0, text = batch["latents"], batch["text"]
    dropped = jax.random.bernoulli(key_drop, method.text_dropout, x0.shape[:1])
    text = jnp.where(dropped[:, None, None], networks.null_text[None], text)
    t = method.p_G.build().sample(key_time, x0.shape[:1])
    if method.frame_times:
        key_pick, key_draw = jax.random.split(key_frames)
        own = jax.random.bernoulli(key_pick, method.frame_times, x0.shape[:1])
        rising = jnp.sort(method.p_G.build().sample(key_draw, x0.shape[:2]), axis=1)
        t = jnp.where(own[:, None], rising, t[:, None])
    loss = flow_matching_loss(networks.plain(params, text), x0, jax.random.normal(key_noise, x0.shape), t)
    return loss.mean(), {"loss_diffusion": loss.mean()}


def accumulate(loss, params: Params, batch: Batch, key: Array, parts: int) -> tuple[Params, Metrics]:
    """Gradient and metrics of loss(params, batch, key), the mean over `parts` equal cuts of the batch."""
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, batch, key)
    cuts = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

    def body(total, cut):
        out = gradient(params, *cut)
        return jax.tree.map(jnp.add, total, out), None

    zero = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], cuts), key)
    )
    total, _ = jax.lax.scan(body, zero, (cuts, jax.random.split(key, parts)))
    grads, metrics = jax.tree.map(lambda x: x / parts, total)
    return grads, metrics | ({"masked": total[1]["masked"]} if "masked" in metrics else {})


def _update(optimizer: optax.GradientTransformation, params: Params, opt: optax.OptState, grads: Params):
    """One optimiser step, left out whole where the gradient is not finite: a bad batch must not end a run."""
    norm = optax.tree.norm(grads)
    updates, new_opt = optimizer.update(grads, opt, params)
    new = (optax.apply_updates(params, updates), new_opt)
    finite = jnp.isfinite(norm)
    params, opt = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (params, opt))
    return params, opt, {"grad_norm": norm, "skipped_updates": (~finite).astype(jnp.int32)}


def make_steps(config: RunConfig, null_text: Float[Array, "L D"], attend: Callable = attention) -> dict[str, Step]:
    """The jitted steps of a run, by name: `student`, `student_dmd`, `critic` for distillation, else `diffusion`.

    Each takes (state, teacher parameters, batch) and donates the state. `attend` is the attention of all networks.
    """
    method, o = config.method, config.optimizer
    networks = Networks(DiT(config.model, attend), null_text, method.guidance)
    gamma = power_ema_exponent(config.ema_rate)

    def finish(state: TrainState, grads: Params, metrics: Metrics) -> tuple[TrainState, Metrics]:
        student, opt, extra = _update(adamw(o, o.lr, o.frozen), state.student, state.student_opt, grads)
        beta = power_ema_beta(student_updates(method, state.step), gamma)
        ema = ema_update(state.ema, student, beta)
        new = state.replace(step=state.step + 1, student=student, student_opt=opt, ema=ema)
        return new, metrics | extra

    def student_step(with_dmd: bool) -> Step:
        def step(state, teacher, batch):
            frozen = {"teacher": teacher, "fake_score": state.fake_score}

            def loss(params, batch, key):
                return student_loss(params, frozen, networks, method, batch, key, state.step, with_dmd)

            return finish(state, *accumulate(loss, state.student, batch, state.key, config.grad_accumulation))

        return step

    def critic_step(state, teacher, batch):
        frozen = {"student": state.student}

        def loss(params, batch, key):
            return fake_score_loss(params, frozen, networks, method, batch, key, state.step)

        grads, metrics = accumulate(loss, state.fake_score, batch, state.key, config.grad_accumulation)
        fake, opt, extra = _update(adamw(o, o.lr_fake), state.fake_score, state.fake_opt, grads)
        return state.replace(step=state.step + 1, fake_score=fake, fake_opt=opt), metrics | extra

    def diffusion_step(state, teacher, batch):
        def loss(params, batch, key):
            return diffusion_loss(params, networks, method, batch, key)

        return finish(state, *accumulate(loss, state.student, batch, state.key, config.grad_accumulation))

    if method.name == "diffusion":
        steps = {"diffusion": diffusion_step}
    else:
        steps = {"student": student_step(False), "student_dmd": student_step(True), "critic": critic_step}
    return {name: jax.jit(step, donate_argnums=0) for name, step in steps.items()}
