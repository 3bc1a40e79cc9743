"""Golden checks of causal training: every field, the loss per sample, and gradients of its sum over the batch."""

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.flow import LogNormal, UniformShift, guided, rf_denoiser, rf_noisy
from rcm_jax.losses.consistency import dcm_loss, dcm_times, rf_scm_loss
from rcm_jax.losses.diffusion import flow_matching_loss
from rcm_jax.losses.distribution import dmd_loss
from rcm_jax.losses.forcing import fopp_times, forcing_loss, over_frames
from rcm_jax.sampling.rollout import given_noises
from rcm_jax.sampling.schedules import MIDDLE, RolloutSchedule
from rcm_jax.sampling.self_rollout import self_rollout
from rcm_jax.types import Velocity
from rcm_jax.wan.causal import pack
from tests.golden_causal import network
from tests.golden_common import Case, Check
from tests.golden_losses import Setting, _checks, _warmup


class CausalSetting(Setting):
    """The causal networks of a case, bound to texts and contexts."""

    def __init__(self, case: Case):
        super().__init__(case, case.config["causal_guidance"])
        self.causal = network(case.config)
        self.spans = self.causal.pattern.spans(self.causal.frames)

    def text(self, name: str = "cond") -> jax.Array:
        return jnp.asarray(self.case.inputs[name])

    def causal_teacher(self) -> Velocity:
        params, x0 = self.params("causal_teacher"), self.latents["x0"]
        return guided(
            *(self.causal.forced_velocity(params, self.text(name), x0) for name in ("cond", "uncond")), self.guidance
        )

    def context(self) -> tuple[jax.Array, jax.Array | None]:
        """The student's context, and its times where it is noisy: the last backward time, from chunk 0 on."""
        x0 = self.latents["x0"]
        if not self.case.config.get("context_from_last_step"):
            return x0, None
        t = jnp.full(x0.shape[:2], MIDDLE[-1], jnp.float64)
        return rf_noisy(x0, self.latents["ctx_noise_0"], t), t

    def gradients(self, loss, bind, name: str = "student"):
        """`Setting.differentiate` for a loss of bind(params)."""
        plain, self.network = self.network, bind
        try:
            return self.differentiate(name, loss)
        finally:
            self.network = plain

    def forced(self, params: dict) -> Velocity:
        return self.causal.forced_velocity(params, self.text(), *self.context())


def _tf(case: Case) -> list[Check]:
    s, config = CausalSetting(case), case.config
    t = s.time("time")

    def loss(student):
        values, terms = forcing_loss(
            student, s.latents["x0"], s.latents["epsilon"], t, weighting=config["loss_weighting"],
            scale=config["loss_scale"],
        )  # fmt: skip
        full_x, full_time = pack(s.latents["x0"], terms["xt"], t, None)
        return values, terms | {"full_x": full_x, "full_time_f64": full_time, "time_B_T_f64": terms["t"]}

    return _checks(case, *s.gradients(loss, s.forced), fields=1e-5, losses=1e-5, gradients=1e-4)


def _df(case: Case) -> list[Check]:
    s, config = CausalSetting(case), case.config
    t = over_frames(jnp.asarray(case.inputs["time_chunks"]), s.spans)

    def loss(student):
        values, terms = forcing_loss(
            student, s.latents["x0"], s.latents["epsilon"], t, weighting=config["loss_weighting"],
            scale=config["loss_scale"],
        )  # fmt: skip
        return values, terms | {"time_B_T_f64": terms["t"]}

    def bind(params):
        return s.causal.velocity(params, s.text())

    return _checks(case, *s.gradients(loss, bind), fields=1e-5, losses=1e-5, gradients=1e-4)


def _tf_scm(case: Case) -> list[Check]:
    s, config = CausalSetting(case), case.config
    teacher, t = s.causal_teacher(), s.time("time")

    def loss(student):
        values, terms = rf_scm_loss(
            student, teacher, s.latents["x0"], s.latents["epsilon"], t, warmup=_warmup(config),
            scale=config["loss_scale"],
        )  # fmt: skip
        context, t_context = s.context()
        full_x, full_time = pack(context, terms["xt"], t, t_context)
        extra = {
            "student_full_x": full_x,
            "student_full_time_f64": full_time,
            "warmup_ratio": jnp.array(_warmup(config)),
        }
        return values, terms | extra

    return _checks(case, *s.gradients(loss, s.forced), fields=1e-5, losses=1e-5, gradients=1e-4)


def _tf_dcm(case: Case) -> list[Check]:
    s, config = CausalSetting(case), case.config
    total, skip = 48, config["dcm_skip"]
    u = s.time("rand_u").astype(jnp.float32) * (1 - skip / total)
    times = dcm_times(u, total_steps=total, skip=skip, shift=3.0)
    H, W, C = s.latents["x0"].shape[2:]

    def loss(student):  # the mean over a frame's numbers, the sum over frames
        values, terms = dcm_loss(
            rf_denoiser(student), s.causal_teacher(), s.latents["x0"], s.latents["epsilon"], times,
            scale=config["loss_scale"] / (H * W * C), noisy=rf_noisy,
        )  # fmt: skip
        return values, terms | {"u": u, "rf_times_f64": times}

    return _checks(case, *s.gradients(loss, s.forced), fields=1e-5, losses=1e-4, gradients=5e-4)


def _schedule(config: dict) -> RolloutSchedule:
    steps = config.get("sf_steps_per_chunk", [4])
    times = tuple((1.0, *MIDDLE[: n - 1], 0.0) for n in steps)
    return RolloutSchedule(times, noisy_context_from=0 if config.get("context_from_last_step") else None)


def _rollout(s: CausalSetting, params: dict, *, replay: bool = False) -> tuple[jax.Array, jax.Array]:
    schedule, inputs = _schedule(s.case.config), s.latents
    some = inputs["sim_noise_0"]
    steps = [inputs.get(f"sim_noise_{i}", jnp.zeros_like(some)) for i in range(max(map(len, schedule.times)) - 1)]
    context = jnp.zeros_like(some)
    for chunk, (a, b) in enumerate(s.spans):
        if (noise := inputs.get(f"ctx_noise_chunk{chunk}")) is not None:
            context = context.at[:, a:b].set(noise)
    noises = given_noises(jnp.stack([*steps, context]), s.causal.pattern)
    n, frames = s.case.config["n_sim"], s.causal.frames
    return self_rollout(s.causal, params, s.text(), noises, schedule, n, frames=frames, replay=replay)


def _sf_dmd(case: Case) -> list[Check]:
    s, config = CausalSetting(case), case.config
    teacher = s.params("bidirectional_teacher")
    teacher = guided(s.network(teacher), s.network(teacher, "uncond"), config["bidirectional_guidance"])
    fake = s.network(s.params("fake_score"))
    replay = config["step"].endswith("replayed")

    def loss(rolled):
        video, last_input = rolled
        values, terms = dmd_loss(
            video, rf_denoiser(fake), rf_denoiser(teacher), s.latents["epsilon"], s.time("D_time"), noisy=rf_noisy
        )
        target = terms["G_x0"] - terms["grad_field"]
        per_frame = jnp.square(terms["G_x0"] - target).sum((2, 3, 4))
        per_chunk = jnp.stack([per_frame[:, a:b].sum(1) for a, b in s.spans])
        extra = {"G_xt": last_input, "target": target, "loss_per_chunk": per_chunk}
        return config["loss_scale_dmd"] * values, terms | extra

    def bind(params):
        return _rollout(s, params, replay=replay)

    return _checks(case, *s.gradients(loss, bind), fields=1e-5, losses=1e-5, gradients=1e-4)


def _critic(case: Case) -> list[Check]:
    s = CausalSetting(case)
    video = jax.jit(lambda params: _rollout(s, params)[0])(s.params("student"))
    noise, t = s.latents["epsilon"], s.time("D_time")
    x_t = rf_noisy(video, noise, t)

    def loss(fake):
        return flow_matching_loss(fake, video, noise, t), {"G_x0": video, "D_xt": x_t, "v_fake": fake(x_t, t)}

    return _checks(case, *s.differentiate("fake_score", loss), fields=1e-5, losses=1e-5, gradients=1e-4)


STEPS = {
    "tf": _tf, "df": _df, "tf_scm": _tf_scm, "tf_dcm": _tf_dcm, "sf_dmd": _sf_dmd, "sf_dmd_replayed": _sf_dmd,
    "critic": _critic,
}  # fmt: skip


def loss_causal(case: Case) -> list[Check]:
    return STEPS[case.config["step"]](case)


def fopp(case: Case) -> list[Check]:
    c, i = case.config, case.inputs
    sampler = LogNormal(c["p_mean"], c["p_std"]) if c["sampler"] == "lognormal" else UniformShift(c["shift"])
    got = fopp_times(
        sampler, *(jnp.asarray(i[name]) for name in ("anchor_chunk_idx", "anchor_rf_t", "exp_left", "exp_right"))
    )
    return [Check("chunk_times_f64", np.asarray(got), case.outputs["chunk_times_f64"], max_abs=1e-9)]


CASES = {"loss_causal": loss_causal, "fopp": fopp}
