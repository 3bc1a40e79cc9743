"""Stage 5: student and critic steps of the 1.3B's rCM recipe on one GPU, one video a step, random weights.

The simulated sampler has 1 to 4 steps in turn (`schedule.simulation_steps`); each is timed, the means are what a run
would see. MFU is by the formula of rcm_jax/training/flops.py, over the data sheet's peak.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from rcm_jax.configs import wan_1_3b_rcm as recipe
from rcm_jax.configs.base import run_config
from rcm_jax.objectives.networks import Networks
from rcm_jax.parallel import batch_sharding, shard, sharded_attention, state_shardings
from rcm_jax.training import flops
from rcm_jax.training.config import MeshConfig, RunConfig
from rcm_jax.training.loop import open_mesh
from rcm_jax.training.schedule import critic_updates, simulation_steps, step_name, student_updates
from rcm_jax.training.state import TrainState, abstract_state, init_state
from rcm_jax.training.step import make_steps
from tests.gpu.parts import Context, Part, peak_gib
from tests.gpu.wan import TINY, random_weights
from tests.tiny import RandomSource


def parts(context: Context) -> Iterator[Part]:
    yield Part("student", functools.partial(time_step, "student_dmd", context.tiny))
    yield Part("critic", functools.partial(time_step, "critic", context.tiny))


def config(tiny: bool) -> RunConfig:
    """The recipe with one video a step on one device."""
    full = run_config(recipe.get_config())
    data, model = dataclasses.replace(full.data, batch_size=1), full.model
    if tiny:
        data, model = dataclasses.replace(data, latent_shape=(2, 4, 8)), dataclasses.replace(model, **TINY)
    return dataclasses.replace(full, data=data, model=model, mesh=MeshConfig(), microbatches=1, teacher="random")


def time_step(name: str, tiny: bool) -> dict:
    run, seconds = config(tiny), {}
    mesh = open_mesh(run, jax.devices()[:1])
    with jax.set_mesh(mesh):
        teacher = shard(random_weights(run.model, "dit"), mesh)
        start = jax.jit(lambda start: init_state(run, start), out_shardings=state_shardings(mesh, abstract_state(run)))
        state, source = start(teacher), RandomSource(run)
        batch = jax.device_put(source.batch(0), batch_sharding(mesh))
        step = make_steps(run, jnp.asarray(source.null_text), sharded_attention(mesh))[name]
        networks = Networks(teacher=teacher)
        state, metrics = step(at_step(run, state, name, 1), networks, batch)  # compiles
        for num_steps in (1,) if tiny else range(1, run.method.max_simulation_steps + 1):
            state = jax.block_until_ready(at_step(run, state, name, num_steps))
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, networks, batch))
            seconds[num_steps] = time.perf_counter() - began
    return report(run, name, seconds, metrics)


def at_step(run: RunConfig, state: TrainState, name: str, num_steps: int) -> TrainState:
    """The state moved to the first step after the warm-up that has that name and simulates so many steps."""
    updates = critic_updates if name == "critic" else student_updates
    for step in range(run.method.tangent_warmup + 1, run.method.tangent_warmup + 1000):
        simulated = simulation_steps(run.method, updates(run.method, step))
        if (step_name(run.method, step), simulated) == (name, num_steps):
            return state.replace(step=jnp.full_like(state.step, step))
    raise ValueError(f"no step {name} simulates {num_steps=}; the recipe has {run.method.max_simulation_steps} at most")


def report(run: RunConfig, name: str, seconds: dict[int, float], metrics: dict) -> dict:
    counts = [flops.kind_flops(run, name, n) for n in seconds]
    work, mean = (sum(values) / len(seconds) for values in (counts, seconds.values()))
    peak = flops.peak(jax.devices()[0].device_kind)
    return {
        "ok": all(bool(jnp.isfinite(value).all()) for value in metrics.values()), "step s": mean,
        "TFLOP": work / 1e12, "TFLOP/s": work / mean / 1e12, "MFU": None if peak is None else work / mean / peak,
        "seconds by simulated steps": {n: round(s, 3) for n, s in seconds.items()}, "peak GiB": peak_gib(),
    }  # fmt: skip
