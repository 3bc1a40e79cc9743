"""Golden checks of causal training, through the objective as in `golden_losses`."""

import jax.numpy as jnp
import numpy as np

from rcm_jax.flow import LogNormal, UniformShift
from rcm_jax.losses.forcing import fopp_times
from rcm_jax.objectives.config import CausalConfig, MethodConfig
from rcm_jax.objectives.draws import Draws
from tests.golden_common import Case, Check
from tests.golden_losses import ROLES, Setting, checks, consistency, critic, dmd
from tests.packed import pack


class CausalSetting(Setting):
    """A case's causal networks, with its chunk pattern and sampler."""

    roles = ROLES | {"teacher": "causal_teacher", "score_teacher": "bidirectional_teacher"}

    def __init__(self, case: Case, **method):
        c = case.config
        causal = CausalConfig(
            pattern=f"c{c['first_chunk_t']}-{c['chunk_t']}", forcing="df" if c["step"] == "df" else "tf",
            weighting=c.get("loss_weighting", "none"), steps_per_chunk=c.get("sf_steps_per_chunk", [4]),
            noisy_context_from=0 if c.get("context_from_last_step") else -1, replay=c["step"].endswith("replayed"),
            score_guidance=c["bidirectional_guidance"],
        )  # fmt: skip
        settings = {"tangent_warmup": c.get("tangent_warmup", 0), "guidance": c["causal_guidance"]}
        super().__init__(case, MethodConfig(**settings | method), causal)

    def packed(self, draws: Draws, terms: dict) -> tuple:
        """What the student was given: [context | x_t] and the times of both."""
        context, t_context = self.objective.binder.context(self.batch, draws)
        return pack(context, terms["xt"], draws.t, t_context)


def _diffusion(case: Case) -> list[Check]:
    """`tf` and `df`."""
    s = CausalSetting(case, name="diffusion", consistency_scale=case.config["loss_scale"])
    t = s.time("time") if case.config["step"] == "tf" else jnp.asarray(case.inputs["time_chunks"])
    draws = Draws(noise=s.latents["epsilon"], t=t)

    def loss(params):
        values, parts = s.objective.diffusion(params, s.batch, draws)
        return values, parts["diffusion"]

    values, terms, grads = s.differentiate("student", loss)
    terms["time_B_T_f64"] = terms["t"]
    if case.config["step"] == "tf":
        terms["full_x"], terms["full_time_f64"] = s.packed(draws, terms)
    return checks(case, values, terms, grads, fields=1e-5, losses=1e-5, gradients=1e-4)


def _tf_scm(case: Case) -> list[Check]:
    s = CausalSetting(case, consistency="rf_scm", dmd_scale=0.0, consistency_scale=case.config["loss_scale"])
    draws = Draws(noise=s.latents["epsilon"], t=s.time("time"), context_noise=s.latents.get("ctx_noise_0"))
    values, terms, grads = s.differentiate("student", consistency(s, draws))
    terms["student_full_x"], terms["student_full_time_f64"] = s.packed(draws, terms)
    return checks(case, values, terms, grads, fields=1e-5, losses=1e-5, gradients=1e-4)


def _tf_dcm(case: Case) -> list[Check]:
    c = case.config
    s = CausalSetting(
        case, consistency="dcm", dmd_scale=0.0, consistency_scale=c["loss_scale"], dcm_skip=c["dcm_skip"], dcm_shift=3.0
    )
    draws = Draws(noise=s.latents["epsilon"], u=s.time("rand_u"))
    values, terms, grads = s.differentiate("student", consistency(s, draws))
    terms["rf_times_f64"] = terms["times"]
    return checks(case, values, terms, grads, fields=1e-5, losses=1e-4, gradients=5e-4)


def _rolled(case: Case) -> tuple[CausalSetting, Draws]:
    """A case of self forcing: the noises of its rollout in the order in which the sampler takes them."""
    s = CausalSetting(case, consistency="", dmd_scale=case.config["loss_scale_dmd"], tangent_warmup=0)
    assert s.num_steps == case.config["n_sim"]
    causal, inputs = s.objective.causal, s.latents
    none = jnp.zeros_like(inputs["epsilon"])
    steps = [inputs.get(f"sim_noise_{i}", none) for i in range(max(causal.steps_per_chunk))]
    context = none
    for chunk, (a, b) in enumerate(causal.spans(none.shape[1])):
        if (noise := inputs.get(f"ctx_noise_chunk{chunk}")) is not None:
            context = context.at[:, a:b].set(noise)
    noises = jnp.stack([*steps, context])
    return s, Draws(simulation_noises=noises, score_noise=inputs["epsilon"], score_t=s.time("D_time"))


def _sf_dmd(case: Case) -> list[Check]:
    s, draws = _rolled(case)
    values, terms, grads = s.differentiate("student", dmd(s, draws))
    terms["target"] = terms["G_x0"] - terms["grad_field"]
    per_frame = jnp.square(terms["grad_field"]).sum((2, 3, 4))
    spans = s.objective.causal.spans(per_frame.shape[1])
    terms["loss_per_chunk"] = jnp.stack([per_frame[:, a:b].sum(1) for a, b in spans])
    return checks(case, values, terms, grads, fields=1e-5, losses=1e-5, gradients=1e-4)


def _critic(case: Case) -> list[Check]:
    s, draws = _rolled(case)
    values, terms, grads = s.differentiate("fake_score", critic(s, draws))
    terms |= {"D_xt": terms["xt"], "v_fake": terms["v_pred"]}
    return checks(case, values, terms, grads, fields=1e-5, losses=1e-5, gradients=1e-4)


STEPS = {
    "tf": _diffusion, "df": _diffusion, "tf_scm": _tf_scm, "tf_dcm": _tf_dcm, "sf_dmd": _sf_dmd,
    "sf_dmd_replayed": _sf_dmd, "critic": _critic,
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
