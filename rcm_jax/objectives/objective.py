"""What is minimised: the losses of the papers put together for one batch, of a bidirectional or a causal student.

`student` is the consistency and the distribution loss together, `critic` the fake score's, `diffusion` a teacher's. All
give a loss a sample and the fields they are made of, by the name of the loss. What is random comes in as `Draws`, what
depends on the count of steps as numbers; `training/step.py` makes both, and takes the mean over the batch.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rcm_jax.data.batch import Batch
from rcm_jax.flow import RF, TRIG, null_rows
from rcm_jax.losses.consistency import dcm_loss, dcm_times, rf_scm_loss, scm_loss
from rcm_jax.losses.diffusion import flow_matching_loss
from rcm_jax.losses.distribution import critic_loss, dmd_loss
from rcm_jax.losses.forcing import forcing_loss, over_frames
from rcm_jax.losses.samples import Terms
from rcm_jax.objectives.binding import Bidirectional, Binder, Causal, NullText, Role, Sizes
from rcm_jax.objectives.config import CausalConfig, MethodConfig
from rcm_jax.objectives.draws import Draws
from rcm_jax.objectives.networks import Networks
from rcm_jax.types import Metrics, Params
from rcm_jax.wan.dit import DiT

Loss = Float[Array, " B"]
BAD = "bad_"  # begins the names of a summary's entries that are of each sample: which of them a loss leaves out
Parts = dict[str, Terms]  # of every loss of a step: its fields, and `loss` [B] and `masked` [B] among them
StudentLoss = Callable[[Params], tuple[Loss, Parts]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The losses under a method. `causal` is None for a bidirectional student."""

    binder: Binder
    method: MethodConfig
    causal: CausalConfig | None = None

    def student(
        self,
        params: Params,
        networks: Networks,
        batch: Batch,
        draws: Draws,
        *,
        warmup: Float[Array, ""] | float,
        num_steps: Int[Array, ""] | int | None,
    ) -> tuple[Loss, Parts]:
        """The sum of `student_losses`."""
        total, parts = jnp.zeros(batch.latents.shape[0]), {}
        for part in self.student_losses(networks, batch, draws, warmup=warmup, num_steps=num_steps):
            loss, terms = part(params)
            total, parts = total + loss, parts | terms
        return total, parts

    def student_losses(
        self,
        networks: Networks,
        batch: Batch,
        draws: Draws,
        *,
        warmup: Float[Array, ""] | float,
        num_steps: Int[Array, ""] | int | None,
    ) -> list[StudentLoss]:
        """The consistency loss, and dmd_scale times the distribution loss on a video of `num_steps` simulated steps,
        each as a function of the student. They share nothing: their gradients may be taken one after the other.

        `num_steps` None leaves the distribution loss out. `warmup` is r of the consistency loss's tangent.
        """

        def consistency(params: Params) -> tuple[Loss, Parts]:
            loss, terms = self._consistency(params, networks, batch, draws, warmup)
            return loss, {"consistency": terms | {"loss": loss}}

        def distribution(params: Params) -> tuple[Loss, Parts]:
            loss, terms = self._distribution(params, networks, batch, draws, num_steps)
            return self.method.dmd_scale * loss, {"dmd": terms | {"loss": loss}}

        return [consistency] * self.method.uses_consistency + [distribution] * (num_steps is not None)

    def _consistency(
        self, params: Params, networks: Networks, batch: Batch, draws: Draws, warmup: Float[Array, ""] | float
    ) -> tuple[Loss, Terms]:
        """sCM, its RF form or dCM; a causal student's are teacher-forced and in rectified flow."""
        method, x0, noise = self.method, batch.latents, draws.noise
        teacher = self.binder.bind(networks.teacher, batch, Role.TEACHER, draws)
        form = RF if self.causal or method.consistency == "rf_scm" else TRIG
        if method.consistency == "dcm":
            student = self.binder.bind(params, batch, Role.STUDENT, draws)
            u = draws.u * (1 - method.dcm_skip / method.dcm_total_steps)
            times = dcm_times(u, total_steps=method.dcm_total_steps, skip=method.dcm_skip, shift=method.dcm_shift)
            times, scale = form.time(times), method.consistency_scale
            if self.causal:
                scale /= math.prod(x0.shape[2:])  # the mean of a frame, the sum over frames
            loss, terms = dcm_loss(
                form.denoiser(student), form.velocity(teacher), x0, noise, times, scale=scale, noisy=form.noisy
            )
            return loss, terms | {"u": u, "times": times}
        student = self.binder.bind(params, batch, Role.TANGENT, draws)
        scm = scm_loss if form is TRIG else rf_scm_loss
        return scm(
            form.velocity(student), form.velocity(teacher), x0, noise, form.time(draws.t), warmup=warmup,
            scale=method.consistency_scale,
        )  # fmt: skip

    def _distribution(
        self, params: Params, networks: Networks, batch: Batch, draws: Draws, num_steps: Int[Array, ""] | int
    ) -> tuple[Loss, Terms]:
        """DMD on the student's own video."""
        form = self.binder.form
        video, own = self.binder.own_video(params, batch, draws, num_steps)
        fake = self.binder.bind(networks.fake_score, batch, Role.FAKE_SCORE, draws)
        teacher = self.binder.bind(networks.scoring, batch, Role.SCORE_TEACHER, draws)
        loss, terms = dmd_loss(
            video, form.denoiser(fake), form.denoiser(teacher), draws.score_noise, form.time(draws.score_t),
            noisy=form.noisy,
        )  # fmt: skip
        return loss, terms | own

    def critic(
        self, params: Params, networks: Networks, batch: Batch, draws: Draws, *, num_steps: Int[Array, ""] | int
    ) -> tuple[Loss, Parts]:
        """The fake score's loss on a video of the student: on x0 in TrigFlow, on v in rectified flow."""
        form = self.binder.form
        video, own = jax.lax.stop_gradient(self.binder.own_video(networks.student, batch, draws, num_steps))
        fake = self.binder.bind(params, batch, Role.FAKE_SCORE, draws)
        if form is TRIG:
            loss, terms = critic_loss(video, form.denoiser(fake), draws.score_noise, form.time(draws.score_t))
        else:
            loss, terms = flow_matching_loss(fake, video, draws.score_noise, draws.score_t)
        return loss, {"critic": terms | own | {"G_x0": video, "loss": loss}}

    def diffusion(self, params: Params, batch: Batch, draws: Draws) -> tuple[Loss, Parts]:
        """Flow matching; of a causal network teacher forcing (one time a video) or diffusion forcing (one a chunk)."""
        batch, x0 = drop_text(batch, self.binder.null_text, draws.dropped), batch.latents
        student = self.binder.bind(params, batch, Role.STUDENT, draws)
        if self.causal:
            t = draws.t
            if self.causal.forcing == "df":
                t = over_frames(t, self.causal.spans(x0.shape[1]))
            weighting, scale = self.causal.weighting, self.method.consistency_scale
            loss, terms = forcing_loss(student, x0, draws.noise, t, weighting=weighting, scale=scale)
        else:
            loss, terms = flow_matching_loss(student, x0, draws.noise, draws.t)
        return loss, {"diffusion": terms | {"loss": loss}}


def make_objective(method: MethodConfig, causal: CausalConfig, networks: DiT | Sizes, null_text: NullText) -> Objective:
    """The objective of a bidirectional student, or of a causal one where the settings have a chunk pattern.

    networks: one for all roles, or `Sizes`.
    """
    sizes = networks if isinstance(networks, Sizes) else Sizes.all(networks)
    if not causal.pattern:
        binder = Bidirectional(sizes, null_text, method.guidance, method.fused_tangent, t_range=method.t_range)
        return Objective(binder, method)
    forced = method.name != "diffusion" or causal.forcing == "tf"
    return Objective(Causal(sizes, null_text, method.guidance, causal, method.fused_tangent, forced), method, causal)


def drop_text(batch: Batch, null_text: NullText, dropped: Bool[Array, " B"] | None) -> Batch:
    """The dropped samples' texts made unconditional."""
    if dropped is None:
        return batch
    null = null_rows(null_text, len(dropped))
    return dataclasses.replace(batch, text=jnp.where(dropped[:, None, None], null, batch.text))


def summary(parts: Parts) -> Metrics:
    """What the log says of a step's losses: means over the samples that count, how many do not, and, for each loss
    under a name that begins with BAD, which [B]."""
    logged = {}
    for name, terms in parts.items():
        logged[f"loss_{name}"] = masked_mean(terms["loss"], terms["masked"])
        logged[f"{BAD}{name}"] = terms["masked"]
        if "g_norm" in terms:
            logged["tangent_norm"] = masked_mean(terms["g_norm"], terms["masked"])
    return logged | {"masked": sum(terms["masked"].sum() for terms in parts.values())}


def masked_mean(values: Float[Array, " B"], masked: Bool[Array, " B"]) -> Float[Array, ""]:
    return jnp.where(masked, 0, values).sum() / jnp.maximum((~masked).sum(), 1)
