"""One training step: an objective differentiated once, the optimiser, the average.

A student step takes the gradients of the consistency and the distribution loss together; a critic step moves the fake
score; which of them a step is, `schedule.py` says. All functions are pure; noise comes from the state's (seed, step).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rcm_jax.kernels.attention import attention
from rcm_jax.objectives.bidirectional import Batch, Objective
from rcm_jax.objectives.causal import CausalObjective
from rcm_jax.training.config import RunConfig
from rcm_jax.training.ema import ema_update, power_ema_beta, power_ema_exponent
from rcm_jax.training.optimizer import adamw
from rcm_jax.training.schedule import student_updates
from rcm_jax.training.state import TrainState
from rcm_jax.types import Metrics, Params
from rcm_jax.wan.dit import DiT

Teachers = dict[str, Params]  # "teacher", and under self forcing "score_teacher"
Step = Callable[[TrainState, Teachers, Batch], tuple[TrainState, Metrics]]


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

    Each takes (state, teachers, batch) and donates the state. `attend` is the attention of all networks.
    """
    method, o, dit = config.method, config.optimizer, DiT(config.model, attend)
    if config.causal.pattern:
        objective = CausalObjective(dit, null_text, method, config.causal)
    else:
        objective = Objective(dit, null_text, method)
    gamma = power_ema_exponent(config.ema_rate)

    def finish(state: TrainState, grads: Params, metrics: Metrics) -> tuple[TrainState, Metrics]:
        student, opt, extra = _update(adamw(o, o.lr, o.frozen), state.student, state.student_opt, grads)
        beta = power_ema_beta(student_updates(method, state.step), gamma)
        ema = ema_update(state.ema, student, beta)
        new = state.replace(step=state.step + 1, student=student, student_opt=opt, ema=ema)
        return new, metrics | extra

    def student_step(with_dmd: bool) -> Step:
        def step(state, teachers, batch):
            frozen = teachers | {"fake_score": state.fake_score}

            def loss(params, batch, key):
                return objective.student(params, frozen, batch, key, state.step, with_dmd)

            return finish(state, *accumulate(loss, state.student, batch, state.key, config.grad_accumulation))

        return step

    def critic_step(state, teachers, batch):
        def loss(params, batch, key):
            return objective.fake_score(params, {"student": state.student}, batch, key, state.step)

        grads, metrics = accumulate(loss, state.fake_score, batch, state.key, config.grad_accumulation)
        fake, opt, extra = _update(adamw(o, o.lr_fake), state.fake_score, state.fake_opt, grads)
        return state.replace(step=state.step + 1, fake_score=fake, fake_opt=opt), metrics | extra

    def diffusion_step(state, teachers, batch):
        grads, metrics = accumulate(objective.diffusion, state.student, batch, state.key, config.grad_accumulation)
        return finish(state, grads, metrics)

    if method.name == "diffusion":
        steps = {"diffusion": diffusion_step}
    else:
        steps = {"student": student_step(False), "student_dmd": student_step(True), "critic": critic_step}
    return {name: jax.jit(step, donate_argnums=0) for name, step in steps.items()}
