"""One training step: an objective differentiated once, the optimiser, the average.

A student step takes the gradients of the consistency and the distribution loss together; a critic step moves the fake
score. Which of them a step is, and the numbers that follow from the count of steps, `schedule.py` says; `loop.py` runs
them. All functions are pure; what is random comes from the state's (seed, step).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, PyTree

from rcm_jax.data.batch import Batch
from rcm_jax.kernels.attention import attention
from rcm_jax.objectives.binding import Sizes
from rcm_jax.objectives.draws import Draws, draw
from rcm_jax.objectives.networks import Networks
from rcm_jax.objectives.objective import BAD, Parts, StudentLoss, make_objective, summary
from rcm_jax.parallel import in_cuts, ours, state_shardings, stay_sharded
from rcm_jax.training.config import OptimizerConfig, RunConfig
from rcm_jax.training.ema import ema_update, power_ema_beta, power_ema_exponent
from rcm_jax.training.optimizer import adamw
from rcm_jax.training.schedule import critic_updates, simulation_steps, student_updates, warmup_ratio
from rcm_jax.training.state import NormRecord, TrainState, abstract_state
from rcm_jax.types import Metrics, Params
from rcm_jax.wan.dit import DiT

Step = Callable[[TrainState, Networks, Batch], tuple[TrainState, Metrics]]
SampleLosses = Callable[[Batch, Draws], Sequence[StudentLoss]]
Gradient = Callable[[Params, Batch, Array], tuple[Params, Metrics]]


def one_after_the_other(losses: Sequence[StudentLoss], params: Params) -> tuple[Params, Parts]:
    """The gradient of the sum of the losses' means over their samples, and all their parts. A loss begins when the
    gradient of the one before it is there, so that memory holds what one backward pass needs, not what all need."""

    def gradient(loss: StudentLoss, params: Params) -> tuple[Params, Parts]:
        def mean(params: Params) -> tuple[Float[Array, ""], Parts]:
            values, parts = loss(params)
            return values.mean(), parts

        grads, parts = jax.grad(mean, has_aux=True)(params)
        return stay_sharded(grads), parts

    total, parts = gradient(losses[0], params)
    for loss in losses[1:]:
        # A branch of its own, or XLA makes the empty buffers of both backward passes in one kernel, before the first.
        params, total, always = jax.lax.optimization_barrier((params, total, True))
        this = functools.partial(gradient, loss)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(this, params))
        grads, more = jax.lax.cond(always, this, lambda params, nothing=nothing: nothing, params)
        total, parts = jax.tree.map(jnp.add, total, grads), parts | more
    return total, parts


def mean_gradient(
    gradient: Gradient, params: Params, batch: Batch, key: Array, microbatches: int
) -> tuple[Params, Metrics]:
    """What `gradient` gives, the mean over equal cuts of the batch; what is of each sample [B] as the batch has them,
    and the metric `masked` summed."""
    if microbatches == 1:
        return gradient(params, batch, key)
    cuts = jax.tree.map(lambda x: in_cuts(x, microbatches), batch)

    def body(total, cut):
        grads, metrics = gradient(params, *cut)
        means, samples = _apart(metrics)
        return jax.tree.map(jnp.add, total, (grads, means)), samples

    grads, metrics = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], cuts), key)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, _apart(metrics)[0]))
    total, samples = jax.lax.scan(body, zero, (cuts, jax.random.split(key, microbatches)))
    grads, metrics = jax.tree.map(lambda x: x / microbatches, total)
    samples = {name: x.swapaxes(0, 1).reshape(-1) for name, x in samples.items()}  # as `in_cuts` took them apart
    return grads, metrics | samples | {"masked": total[1]["masked"]}


def _apart(metrics: Metrics) -> tuple[Metrics, Metrics]:
    """Numbers, and what is of each sample."""
    samples = {name: x for name, x in metrics.items() if name.startswith(BAD)}
    return {name: x for name, x in metrics.items() if name not in samples}, samples


def _update(
    optimizer: optax.GradientTransformation, config: OptimizerConfig, params: Params, opt: optax.OptState,
    norms: NormRecord, grads: Params, metrics: Metrics,
) -> tuple[Array, tuple[Params, optax.OptState, NormRecord], Metrics]:  # fmt: skip
    """(whether the update counts, what it makes of params, optimiser state and record, metrics).

    It does not where a loss has no sample left, where a loss or the gradient is not finite, and where the gradient is a
    spike: nothing of the state may then change, since a bad batch must not end a run.
    """
    norm = optax.tree.norm(grads)
    losses = [value for name, value in metrics.items() if name.startswith("loss_")]
    samples = [bad for name, bad in metrics.items() if name.startswith(BAD)]
    finite = jnp.isfinite(jnp.stack([norm, *losses])).all() & ~jnp.stack([bad.all() for bad in samples]).any()
    spike = finite & norms.is_spike(norm, config.spike)
    updates, new_opt = optimizer.update(grads, opt, params)
    new = (optax.apply_updates(params, updates), new_opt, norms.with_norm(norm))
    counts = finite & ~spike
    extra = {"grad_norm": norm, "skipped_updates": (~counts).astype(jnp.int32), "spikes": spike.astype(jnp.int32)}
    return counts, new, metrics | extra


def _if(counts: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """The new where the update counts, else the old, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, old)


def make_steps(config: RunConfig, null_text: Float[Array, "L D"], attend: Callable = attention) -> dict[str, Step]:
    """The jitted steps of a run by the names that `schedule.step_name` gives: `student`, `student_dmd`, `critic` for
    distillation, else `diffusion`.

    Each takes (state, networks, batch) and donates the state. `attend` is the attention of all networks. Under
    `jax.set_mesh` the state comes back where `parallel.state_shardings` has it on that mesh.
    """
    method, o = config.method, config.optimizer
    sizes = Sizes(*(DiT(model, attend) for model in config.models))
    objective = make_objective(method, config.causal, sizes, null_text)
    gamma = power_ema_exponent(config.ema_rate)

    def gradient(kind: str, losses: SampleLosses, params: Params, batch: Batch, key: Array) -> tuple[Params, Metrics]:
        def of_cut(params, batch, key):
            batch = jax.tree.map(lambda x: x.astype(jnp.float32), batch)  # shards' latents and texts come in bfloat16
            draws = draw(kind, method, config.causal, config.diffusion, key, batch.latents.shape)
            grads, parts = one_after_the_other(losses(batch, draws), params)
            return grads, summary(parts)

        return mean_gradient(of_cut, params, batch, key, config.microbatches)

    def finish(state: TrainState, grads: Params, metrics: Metrics) -> tuple[TrainState, Metrics]:
        old = state.student, state.student_opt, state.student_norms
        counts, new, metrics = _update(adamw(o, o.lr, o.frozen), o, *old, grads, metrics)
        beta = power_ema_beta(student_updates(method, state.step), gamma)
        ema = ema_update(state.ema, new[0], beta)
        (student, opt, norms), ema = _if(counts, (new, ema), (old, state.ema))
        new = state.replace(step=state.step + 1, student=student, student_opt=opt, student_norms=norms, ema=ema)
        return new, metrics

    def student_step(with_dmd: bool) -> Step:
        def step(state: TrainState, networks: Networks, batch: Batch) -> tuple[TrainState, Metrics]:
            networks = dataclasses.replace(networks, fake_score=state.fake_score)
            num_steps = simulation_steps(method, student_updates(method, state.step)) if with_dmd else None

            def losses(batch, draws):
                warmup = warmup_ratio(method, state.step)
                return objective.student_losses(networks, batch, draws, warmup=warmup, num_steps=num_steps)

            return finish(state, *gradient("student", losses, state.student, batch, state.key))

        return step

    def critic_step(state: TrainState, networks: Networks, batch: Batch) -> tuple[TrainState, Metrics]:
        networks = dataclasses.replace(networks, student=state.student)
        num_steps = simulation_steps(method, critic_updates(method, state.step))

        def losses(batch, draws):
            return [lambda params: objective.critic(params, networks, batch, draws, num_steps=num_steps)]

        grads, metrics = gradient("critic", losses, state.fake_score, batch, state.key)
        old = state.fake_score, state.fake_opt, state.fake_norms
        counts, new, metrics = _update(adamw(o, o.lr_fake), o, *old, grads, metrics)
        fake, opt, norms = _if(counts, new, old)
        return state.replace(step=state.step + 1, fake_score=fake, fake_opt=opt, fake_norms=norms), metrics

    def diffusion_step(state: TrainState, networks: Networks, batch: Batch) -> tuple[TrainState, Metrics]:
        def losses(batch, draws):
            return [lambda params: objective.diffusion(params, batch, draws)]

        return finish(state, *gradient("diffusion", losses, state.student, batch, state.key))

    if method.name == "diffusion":
        steps = {"diffusion": diffusion_step}
    else:
        steps = {"student": student_step(False), "student_dmd": student_step(True), "critic": critic_step}
    return {name: jax.jit(step, donate_argnums=0, **_outputs(config)) for name, step in steps.items()}


def _outputs(config: RunConfig) -> dict[str, Any]:
    """Where a step's outputs lie, for `jax.jit`: the state as the table has it, so that the next step finds what this
    one was compiled for, and the metrics on every device, so that every process can read them."""
    if ours() is None:
        return {}
    mesh = jax.sharding.get_mesh()
    return {"out_shardings": (state_shardings(mesh, abstract_state(config)), NamedSharding(mesh, P()))}
