"""Golden checks of the losses: every field, the loss per sample, and gradients of its sum over the batch.

They run through the objective that trains: a case's weights are bound by its binder, and a case's noises and times come
in as its draws.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.convert.dit import from_wan, to_wan
from rcm_jax.data.batch import Batch
from rcm_jax.flow import trig_to_rf
from rcm_jax.losses.samples import Terms
from rcm_jax.objectives.config import CausalConfig, MethodConfig
from rcm_jax.objectives.draws import Draws
from rcm_jax.objectives.networks import Networks
from rcm_jax.objectives.objective import Loss, Objective, make_objective
from rcm_jax.training.schedule import critic_updates, simulation_steps, student_updates, warmup_ratio
from rcm_jax.types import Params
from rcm_jax.wan.dit import DiT
from tests.golden_common import Case, Check, channels_first, channels_last
from tests.golden_networks import dit_config, role

ROLES = {"teacher": "teacher", "fake_score": "fake_score", "student": "student"}  # a network's name in the file


class Setting:
    """What all losses of a case share: the objective, and the file's weights, batch and draws as it takes them."""

    roles: Mapping[str, str] = ROLES

    def __init__(self, case: Case, method: MethodConfig, causal: CausalConfig | None = None):
        self.case, self.config, self.method = case, dit_config(case.config), method
        self.latents = {k: jnp.asarray(channels_last(v)) for k, v in case.inputs.items() if v.ndim == 5}
        text, null_text = (jnp.asarray(case.inputs[name]) for name in ("cond", "uncond"))
        self.objective: Objective = make_objective(method, causal or CausalConfig(), DiT(self.config), null_text)
        noise = self.latents["epsilon"]
        self.batch = Batch(self.latents.get("x0", jnp.full_like(noise, jnp.nan)), text)  # NaN: its shape alone is used
        self.networks = Networks(
            **{name: self.params(file) for name, file in self.roles.items() if role(case, file)}
        )  # fmt: skip

    def params(self, name: str) -> Params:
        return from_wan(role(self.case, name), self.config)

    def time(self, name: str) -> jax.Array | None:
        return jnp.asarray(self.case.inputs[name])[:, 0] if name in self.case.inputs else None

    @property
    def warmup(self) -> jax.Array:
        return warmup_ratio(self.method, self.case.config["iteration"])

    @property
    def num_steps(self) -> int:
        count = critic_updates if self.case.config["step"] == "critic" else student_updates
        return simulation_steps(self.method, count(self.method, self.case.config["iteration"]))

    def differentiate(
        self, name: str, loss: Callable[[Params], tuple[Loss, Terms]]
    ) -> tuple[Loss, Terms, dict[str, np.ndarray]]:
        """(loss [B], terms, gradients in Wan2.1's names) of the network `name`."""
        params = self.params(name)
        values, terms = jax.jit(loss)(params)
        grads = jax.jit(jax.grad(lambda params: loss(params)[0].sum()))(params)
        return values, terms, to_wan(jax.tree.map(np.asarray, grads), self.config)


def checks(
    case: Case, loss: Loss, terms: Terms, grads: dict, *, fields: float, losses: float, gradients: float
) -> list[Check]:
    """One check for every output the file has; 5-D fields are put back to channels first, times to [.., B, 1]."""
    out = [Check("loss", loss, case.outputs["loss"], rel=losses)]
    for name, want in case.outputs.items():
        if name.startswith("grad/"):
            out.append(Check(name, grads[name.removeprefix("grad/")], want, rel=gradients))
        elif name != "loss" and name in terms:
            got = np.asarray(terms[name])
            got = channels_first(got) if got.ndim >= 5 else got.reshape(want.shape) if got.size == want.size else got
            out.append(Check(name, got, want, rel=fields))
    return out


def consistency(s: Setting, draws: Draws) -> Callable[[Params], tuple[Loss, Terms]]:
    def loss(params: Params) -> tuple[Loss, Terms]:
        values, parts = s.objective.student(
            params, s.networks, s.batch, draws, warmup=s.warmup if "iteration" in s.case.config else 1.0, num_steps=None
        )  # fmt: skip
        return values, parts["consistency"]

    return loss


def dmd(s: Setting, draws: Draws) -> Callable[..., tuple[Loss, Terms]]:
    def loss(params: Params, num_steps: int | jax.Array = s.num_steps) -> tuple[Loss, Terms]:
        values, parts = s.objective.student(params, s.networks, s.batch, draws, warmup=1.0, num_steps=num_steps)
        return values, parts["dmd"]

    return loss


def critic(s: Setting, draws: Draws) -> Callable[..., tuple[Loss, Terms]]:
    def loss(params: Params, num_steps: int | jax.Array = s.num_steps) -> tuple[Loss, Terms]:
        values, parts = s.objective.critic(params, s.networks, s.batch, draws, num_steps=num_steps)
        return values, parts["critic"]

    return loss


def _consistency_method(case: Case, name: str, **settings) -> MethodConfig:
    c = case.config
    return MethodConfig(
        consistency=name, consistency_scale=c["loss_scale"], dmd_scale=0.0, guidance=c["guidance"],
        tangent_warmup=c.get("tangent_warmup", 0), **settings,
    )  # fmt: skip


def _scm(case: Case) -> list[Check]:
    s = Setting(case, _consistency_method(case, "scm"))
    draws = Draws(noise=s.latents["epsilon"], t=trig_to_rf(s.time("time")))
    return checks(case, *s.differentiate("student", consistency(s, draws)), fields=5e-5, losses=1e-5, gradients=1e-4)


def _dcm(case: Case) -> list[Check]:
    settings = {name: case.config[name] for name in ("dcm_total_steps", "dcm_skip", "dcm_shift")}
    s = Setting(case, _consistency_method(case, "dcm", **settings))
    draws = Draws(noise=s.latents["epsilon"], u=s.time("rand_u"))
    values, terms, grads = s.differentiate("student", consistency(s, draws))
    terms["trig_times_f64"] = terms["times"]
    return checks(case, values, terms, grads, fields=1e-5, losses=1e-4, gradients=5e-4)


def loss_rcm_rf_scm(case: Case) -> list[Check]:
    s = Setting(case, _consistency_method(case, "rf_scm"))
    draws = Draws(noise=s.latents["epsilon"], t=s.time("time"))
    return checks(case, *s.differentiate("student", consistency(s, draws)), fields=1e-5, losses=1e-5, gradients=1e-4)


def _simulated(case: Case, make: Callable[[Setting, Draws], Callable], network: str) -> list[Check]:
    """`dmd` or `critic`: the student's sampler is simulated with the file's noises and draws of times."""
    c = case.config
    fixed = c.get("dmd_fix_timesteps", False)
    method = MethodConfig(
        consistency="", dmd_scale=c["loss_scale_dmd"], guidance=c["guidance"], tangent_warmup=0, dmd_fixed_times=fixed
    )
    s = Setting(case, method)
    assert s.num_steps == c["n_sim"]
    between = range(c["n_sim"] - 1)
    draws = Draws(
        simulation_noises=jnp.stack([s.latents["init_noise"], *(s.latents[f"sim_noise_{i}"] for i in between)]),
        simulation_t=None if fixed else trig_to_rf(jnp.stack([s.time(f"sim_time_draw_{i}") for i in between])),
        score_noise=s.latents["epsilon"],
        score_t=trig_to_rf(s.time("D_time")),
    )
    loss = make(s, draws)
    values, terms, grads = s.differentiate(network, loss)
    # What a simulation of k steps hands to its last one, for every k: the whole way through the sampler.
    shorter = jax.jit(lambda k: loss(s.params(network), k)[1])
    ways = [shorter(k) for k in range(1, c["n_sim"] + 1)]
    terms["sim_traj"] = jnp.stack([*(way["G_xt"] for way in ways), terms["G_x0"]])
    times = jnp.stack([way["G_time"] for way in ways])
    terms["sim_times_f64"] = jnp.concatenate([times, jnp.zeros_like(times[:1])])[..., None]
    return checks(case, values, terms, grads, fields=1e-5, losses=1e-5, gradients=1e-4)


def loss_rcm(case: Case) -> list[Check]:
    return {
        "scm": _scm,
        "dcm": _dcm,
        "dmd": lambda case: _simulated(case, dmd, "student"),
        "critic": lambda case: _simulated(case, critic, "fake_score"),
    }[case.config["step"]](case)


CASES = {"loss_rcm": loss_rcm, "loss_rcm_rf_scm": loss_rcm_rf_scm}
