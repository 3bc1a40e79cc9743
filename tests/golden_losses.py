"""Golden checks of the losses: every field, the loss per sample, and gradients of its sum over the batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.convert.dit import from_wan, to_wan
from rcm_jax.flow import guided, rf_to_trig, trig_denoiser, trig_velocity
from rcm_jax.losses.consistency import dcm_loss, dcm_times, rf_scm_loss, scm_loss
from rcm_jax.losses.distribution import critic_loss, dmd_loss, fixed_simulation_times, simulate, simulation_times
from rcm_jax.types import Velocity
from rcm_jax.wan.dit import DiT, velocity
from tests.golden_common import Case, Check, channels_first, channels_last
from tests.golden_networks import dit_config, role

Loss = Callable[[Callable[[dict], Velocity]], tuple[jax.Array, dict]]


class Setting:
    """What all losses of a case share: the networks bound to the texts, and the inputs channels-last."""

    def __init__(self, case: Case, guidance: float):
        self.case, self.config = case, dit_config(case.config)
        self.dit = DiT(self.config)
        self.guidance = guidance
        latents = {k: v for k, v in case.inputs.items() if v.ndim == 5}
        self.latents = {k: jnp.asarray(channels_last(v)) for k, v in latents.items()}

    def params(self, name: str) -> dict:
        return from_wan(role(self.case, name), self.config)

    def network(self, params: dict, text: str = "cond") -> Velocity:
        return velocity(self.dit, params, jnp.asarray(self.case.inputs[text]))

    def teacher(self) -> Velocity:
        params = self.params("teacher")
        return guided(self.network(params), self.network(params, "uncond"), self.guidance)

    def time(self, name: str) -> jax.Array:
        return jnp.asarray(self.case.inputs[name])[:, 0]

    def differentiate(self, name: str, loss: Loss) -> tuple[np.ndarray, dict, dict[str, np.ndarray]]:
        """(loss [B], terms, gradients in Wan2.1's names) of the network `name`."""

        @jax.jit
        @jax.value_and_grad
        def total(params):
            return loss(self.network(params))[0].sum()

        params = self.params(name)
        values, terms = jax.jit(lambda params: loss(self.network(params)))(params)
        return values, terms, to_wan(jax.tree.map(np.asarray, total(params)[1]), self.config)


def _checks(
    case: Case, loss, terms: dict, grads: dict, *, fields: float, losses: float, gradients: float
) -> list[Check]:
    """One check for every output the file has; 5-D fields are put back to channels first, times to [.., B, 1]."""
    checks = [Check("loss", loss, case.outputs["loss"], rel=losses)]
    for name, want in case.outputs.items():
        if name.startswith("grad/"):
            checks.append(Check(name, grads[name.removeprefix("grad/")], want, rel=gradients))
        elif name != "loss" and name in terms:
            got = np.asarray(terms[name])
            got = channels_first(got) if got.ndim >= 5 else got.reshape(want.shape) if got.size == want.size else got
            checks.append(Check(name, got, want, rel=fields))
    return checks


def _warmup(config: dict) -> float:
    """r = min(1, step / tangent_warmup), 1 without a warm-up."""
    return min(1.0, config["iteration"] / config["tangent_warmup"]) if config["tangent_warmup"] else 1.0


def _scm(case: Case) -> list[Check]:
    s = Setting(case, case.config["guidance"])
    teacher = trig_velocity(s.teacher())

    def loss(student):
        return scm_loss(
            trig_velocity(student), teacher, s.latents["x0"], s.latents["epsilon"], s.time("time"),
            warmup=_warmup(case.config), scale=case.config["loss_scale"],
        )  # fmt: skip

    return _checks(case, *s.differentiate("student", loss), fields=5e-5, losses=1e-5, gradients=1e-4)


def _dcm(case: Case) -> list[Check]:
    s, config = Setting(case, case.config["guidance"]), case.config
    teacher = trig_velocity(s.teacher())
    u = s.time("rand_u") * (1 - config["dcm_skip"] / config["dcm_total_steps"])
    times = rf_to_trig(
        dcm_times(
            u.astype(jnp.float32), total_steps=config["dcm_total_steps"], skip=config["dcm_skip"],
            shift=config["dcm_shift"],
        )
    )  # fmt: skip

    def loss(student):
        values, terms = dcm_loss(
            trig_denoiser(student), teacher, s.latents["x0"], s.latents["epsilon"], times, scale=config["loss_scale"]
        )
        return values, terms | {"u": u, "trig_times_f64": times}

    return _checks(case, *s.differentiate("student", loss), fields=1e-5, losses=1e-4, gradients=5e-4)


def _simulation(s: Setting) -> tuple[jax.Array, jax.Array, int]:
    """(times [n, B], noises [n-1, B, …], n) of a case's backward simulation."""
    n = s.case.config["n_sim"]
    start = s.latents["init_noise"]
    noises = [s.latents[f"sim_noise_{i}"] for i in range(n - 1)]
    noises = jnp.stack(noises) if noises else jnp.zeros((0, *start.shape))
    if s.case.config.get("dmd_fix_timesteps"):
        return fixed_simulation_times(start.shape[0], jnp.result_type(float))[:n], noises, n
    draws = [s.time(f"sim_time_draw_{i}") for i in range(n - 1)]
    draws = jnp.stack(draws) if draws else jnp.zeros((0, start.shape[0]), jnp.result_type(float))
    return simulation_times(draws), noises, n


def _simulation_terms(s: Setting, student: Velocity, video: jax.Array) -> dict:
    times, noises, n = _simulation(s)
    states = [simulate(trig_denoiser(student), s.latents["init_noise"], times, noises, k)[0] for k in range(1, n + 1)]
    zero = jnp.zeros_like(times[:1])
    return {"sim_traj": jnp.stack([*states, video]), "sim_times_f64": jnp.concatenate([times, zero])[..., None]}


def _dmd(case: Case) -> list[Check]:
    s = Setting(case, case.config["guidance"])
    teacher, fake = trig_denoiser(s.teacher()), trig_denoiser(s.network(s.params("fake_score")))
    times, noises, n = _simulation(s)
    frozen = s.network(s.params("student"))
    z, theta = simulate(trig_denoiser(frozen), s.latents["init_noise"], times, noises, n)

    def loss(student):
        video = trig_denoiser(student)(z, theta)
        values, terms = dmd_loss(video, fake, teacher, s.latents["epsilon"], s.time("D_time"))
        return case.config["loss_scale_dmd"] * values, terms | _simulation_terms(s, frozen, terms["G_x0"])

    return _checks(case, *s.differentiate("student", loss), fields=1e-5, losses=1e-5, gradients=1e-4)


def _critic(case: Case) -> list[Check]:
    s = Setting(case, case.config["guidance"])
    student = s.network(s.params("student"))
    times, noises, n = _simulation(s)
    video = trig_denoiser(student)(*simulate(trig_denoiser(student), s.latents["init_noise"], times, noises, n))

    def loss(fake):
        values, terms = critic_loss(video, trig_denoiser(fake), s.latents["epsilon"], s.time("D_time"))
        return values, terms | _simulation_terms(s, student, video)

    return _checks(case, *s.differentiate("fake_score", loss), fields=1e-5, losses=1e-5, gradients=1e-4)


def loss_rcm_rf_scm(case: Case) -> list[Check]:
    s = Setting(case, case.config["guidance"])
    teacher = s.teacher()

    def loss(student):
        return rf_scm_loss(
            student, teacher, s.latents["x0"], s.latents["epsilon"], s.time("time"),
            warmup=_warmup(case.config), scale=case.config["loss_scale"],
        )  # fmt: skip

    return _checks(case, *s.differentiate("student", loss), fields=1e-5, losses=1e-5, gradients=1e-4)


def loss_rcm(case: Case) -> list[Check]:
    return {"scm": _scm, "dcm": _dcm, "dmd": _dmd, "critic": _critic}[case.config["step"]](case)


CASES = {"loss_rcm": loss_rcm, "loss_rcm_rf_scm": loss_rcm_rf_scm}
