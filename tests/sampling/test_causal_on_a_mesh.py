"""The causal network on several devices: the numbers of one device, and a cache that lies cut by heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.aot.hlo import read
from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkPattern
from rcm_jax.parallel import make_mesh, shard, sharded_attention
from rcm_jax.sampling.rollout import chunk_noises, rollout
from rcm_jax.sampling.schedules import few_step_schedule, ode_schedule
from rcm_jax.sampling.stream import open_caches, sample_step, stream
from rcm_jax.wan.dit import DiT
from tests.tiny import MODEL as TINY
from tests.tiny import perturbed_params

MODEL = dataclasses.replace(TINY, remat="none")
SIZE = (2, 6)  # 3 tokens a latent frame: chunks that two devices do not divide
NULL = jnp.zeros((5, MODEL.text_dim))
STEPS = few_step_schedule([3, 2], middle=(0.9, 0.6), noisy_context_from=1)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 2, 2, devices=jax.devices()[:4])


@pytest.fixture(scope="module")
def params():
    return perturbed_params(MODEL)


def network(pattern, frames, window=None, sink=0, attend=None):
    dit = DiT(MODEL) if attend is None else DiT(MODEL, attend)
    return CausalDiT(dit, ChunkPattern.parse(pattern), frames, SIZE, window, sink)


@pytest.mark.parametrize(
    ("causal", "schedule", "frames", "batch"),
    [
        pytest.param(network("c1-1", 3), few_step_schedule([1]), 3, 1, marks=pytest.mark.slow),
        pytest.param(network("c1-2", 5), STEPS, 5, 3, marks=pytest.mark.slow),
        pytest.param(network("c1-2", 5, window=2), few_step_schedule([2]), 7, 2, marks=pytest.mark.slow),
        pytest.param(network("c1-1", 3, window=2, sink=1), few_step_schedule([2]), 6, 1, marks=pytest.mark.slow),
        pytest.param(network("c3-3", 6), ode_schedule(2, guidance=2.0), 6, 3, marks=pytest.mark.long),
    ],
    ids=["frames", "noisy context", "window", "sink", "guided ODE"],
)
def test_rollout_and_stream_are_those_of_one_device(mesh, params, causal, schedule, frames, batch):
    text = jax.random.normal(jax.random.key(3), (batch, 5, MODEL.text_dim))
    noises = chunk_noises(5, jnp.arange(batch), 4, (*SIZE, MODEL.in_channels))

    def whole(causal, params):
        run = jax.jit(lambda p: rollout(causal, p, text, noises, schedule, frames=frames, null_text=NULL))
        return run(params)

    want = whole(causal, params)
    cut = dataclasses.replace(causal, dit=DiT(MODEL, sharded_attention(mesh)))
    with jax.set_mesh(mesh):
        spread = shard(params, mesh)
        np.testing.assert_allclose(whole(cut, spread), want, atol=2e-5)
        chunks = len(causal.pattern.spans(frames))
        parts = stream(cut, spread, text, noises, schedule, lambda x, _: (x, None), chunks=chunks, null_text=NULL)
        np.testing.assert_allclose(np.concatenate(list(parts), axis=1), want, atol=2e-5)


def test_heads_that_the_axis_does_not_divide_are_named(params):
    mesh = make_mesh(1, 1, 4, devices=jax.devices()[:4])
    causal = network("c1-1", 3, attend=sharded_attention(mesh))
    noises = chunk_noises(5, jnp.arange(1), 1, (*SIZE, MODEL.in_channels))
    text = jnp.zeros((1, 5, MODEL.text_dim))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"heads=2 must be divisible by mesh.sequence=4"):
        rollout(causal, params, text, noises, few_step_schedule([1]), frames=3)


def test_a_mesh_of_other_axes_leaves_the_cache_alone():
    with jax.set_mesh(jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])):
        assert network("c1-1", 3).init_cache(1).k.sharding.is_fully_replicated


def test_the_cache_lies_cut_by_heads(mesh, params):
    causal = network("c1-2", 7, attend=sharded_attention(mesh))
    text = jax.random.normal(jax.random.key(3), (2, 5, MODEL.text_dim))
    whole = causal.init_cache(2).k.shape
    part = (whole[0], 1, whole[2], whole[3] // 2, whole[4])  # a sample and a head a device
    with jax.set_mesh(mesh):
        spread, cache = shard(params, mesh), jax.jit(causal.init_cache, static_argnums=0)(2)
        assert cache.k.sharding.shard_shape(whole) == part
        x, t = jnp.ones((2, 2, *SIZE, MODEL.in_channels)), jnp.full(2, 0.5)
        prompt = jax.jit(causal.prompt)(spread, text)
        step = jax.jit(causal.step).lower(spread, x, t, prompt, cache, jnp.int32(1)).compile()
        _, cache = step(spread, x, t, prompt, cache, jnp.int32(1))
    assert cache.k.sharding.shard_shape(whole) == part
    assert cache.v.sharding.shard_shape(whole) == part
    gathers = [line for line in step.as_text().splitlines() if " all-gather(" in line]
    assert gathers, "the parameters are gathered, so this finds gathers"
    assert not [line for line in gathers if f",{whole[2]}," in line.split("all-gather(")[0]], "of the cache none"


def test_weights_are_gathered_once_for_all_steps(mesh, params):
    causal = network("c1-2", 5, attend=sharded_attention(mesh))
    schedule = few_step_schedule([4])
    text = jax.random.normal(jax.random.key(3), (2, 5, MODEL.text_dim))
    with jax.set_mesh(mesh):
        spread = shard(params, mesh)
        prompts, caches = open_caches(causal, spread, text, None, schedule)
        drawn, (times, _) = jnp.ones((4, 2, 2, *SIZE, MODEL.in_channels)), schedule.chunk(1)
        how = {"times": times, "noisy_context": False, "ode": False, "guidance": 1.0}
        program = sample_step.lower(causal, spread, prompts, caches, jnp.int32(1), drawn, **how).compile()
    module = read(program.as_text())
    gathers = [(i, times) for _, i, times in module.scheduled() if i.opcode.startswith("all-gather")]
    of_weights = [times for i, times in gathers if set(i.arrays[0][1][-2:]) <= {MODEL.dim, MODEL.ffn_dim}]
    assert of_weights, "weights are gathered, so this finds them"
    assert max(of_weights) == 1
