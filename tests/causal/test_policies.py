"""What is kept of the past: the published numbers are in the goldens; here what holds for every policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.causal.cache import Ring
from rcm_jax.causal.network import CausalDiT
from rcm_jax.causal.policies import policy_of
from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.parallel import make_mesh, shard, sharded_attention
from rcm_jax.sampling.rollout import chunk_noises, rollout
from rcm_jax.sampling.schedules import few_step_schedule
from rcm_jax.sampling.stream import stream
from rcm_jax.wan.dit import DiT
from tests.tiny import MODEL as TINY
from tests.tiny import perturbed_params

MODEL = dataclasses.replace(TINY, remat="none")
SIZE = (2, 4)
TEXT = jax.random.normal(jax.random.key(3), (2, 5, MODEL.text_dim))
SCHEDULE = few_step_schedule([2])
SMALL = {  # reached after a few chunks
    "sliding_window": dict(window_blocks=2, sink_blocks=1),
    "rolling_sink": dict(total_blocks=3, sink_blocks=2, recent_blocks=1),
    "infinity_rope": dict(cache_blocks=3, sink_blocks=1, f_limit=6, flush_interval_blocks=5, cuts=(3,)),
    "deep_forcing": dict(sink_frames=1, budget_frames=4, recent_frames=2),
    "memrope": dict(sink_frames=1, local_frames=2),
    "relax_forcing": dict(sink_frames=1, budget_frames=4, recent_frames=2),
}
LARGE = {  # not reached in so few
    "sliding_window": dict(window_blocks=9),
    "rolling_sink": dict(total_blocks=9, sink_blocks=8, recent_blocks=1),
    "infinity_rope": dict(cache_blocks=9, f_limit=9),
    "deep_forcing": {}, "memrope": {}, "relax_forcing": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return perturbed_params(MODEL)


def network(policy, pattern="c1-2", frames=7, attend=None):
    dit = DiT(MODEL) if attend is None else DiT(MODEL, attend)
    return CausalDiT(dit, ChunkPattern.parse(pattern), frames, SIZE, policy=policy)


def noises(batch=2):
    return chunk_noises(5, jnp.arange(batch), 4, (*SIZE, MODEL.in_channels))


def video(causal, params, frames):
    return jax.jit(lambda p: rollout(causal, p, TEXT, noises(), SCHEDULE, frames=frames))(params)


@pytest.fixture(scope="module")
def whole(params):
    """On all of its past."""
    return video(network(None, frames=15), params, 15)


def some(policies, quick):
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in policies]


@pytest.mark.parametrize("name", some(LARGE, "relax_forcing"))
def test_until_something_is_dropped_all_policies_are_none(params, whole, name):
    got = video(network(policy_of(name, **LARGE[name])), params, 7)
    np.testing.assert_allclose(got, whole[:, :7], atol=2e-5)


@pytest.mark.parametrize("name", some(SMALL, "infinity_rope"))
def test_one_program_serves_chunks_without_end(params, whole, name):
    """More than the network's latent frames; a stream is the rollout; and what is dropped is missed."""
    causal = network(policy_of(name, **SMALL[name]), frames=3)
    got = video(causal, params, 15)
    np.testing.assert_allclose(got[:, :1], whole[:, :1], atol=2e-5)
    assert np.abs(got[:, 9:] - whole[:, 9:]).max() > 1e-3
    assert np.abs(got[:, 9:] - got[:, 7:13]).max() > 1e-3
    parts = stream(causal, params, TEXT, noises(), SCHEDULE, lambda x, _: (x, None), chunks=8)
    np.testing.assert_allclose(np.concatenate(list(parts), axis=1), got, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_policies_on_a_mesh(params, name):
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    policy = policy_of(name, **SMALL[name])
    want = video(network(policy, frames=3), params, 11)
    with jax.set_mesh(mesh):
        got = video(network(policy, frames=3, attend=sharded_attention(mesh)), shard(params, mesh), 11)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_published_window_is_a_ring():
    assert policy_of("sliding_window", window_blocks=6, sink_blocks=2) == Ring(window=5, sink=2)
    assert policy_of("none") == Ring()


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("fifo", {}, r"cache_policy=fifo must be one of none, sliding_window"),
        ("sliding_window", dict(window_blocks=2, sink_blocks=2), r"sink_blocks=2 must be .* less than window_blocks=2"),
        ("rolling_sink", dict(total_blocks=4), r"total_blocks=4 must be sink_blocks=5 and recent_blocks=1 together"),
        ("infinity_rope", dict(cache_blocks=1), r"sink_blocks=1 must be fewer than cache_blocks=1"),
        ("deep_forcing", dict(budget_frames=13), r"budget_frames=13 must be at least sink_frames=10 and recent_frames"),
        ("memrope", dict(alpha_long=0.0), r"alpha_long=0.0 must be above 0 and at most 1"),
        ("memrope", dict(local_frames=0), r"local_frames=0 must be at least 1"),
        ("relax_forcing", dict(alignment_weight=1.5), r"alignment_weight=1.5 must be from 0 to 1"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(name, settings, error):
    with pytest.raises(ArgumentError, match=error):
        policy_of(name, **settings)


def test_a_policy_that_does_not_fit_the_network():
    with pytest.raises(ArgumentError, match=r"f_limit=1 must be at least a chunk's 2 latent frames"):
        network(policy_of("infinity_rope", f_limit=1))
    with pytest.raises(ArgumentError, match=r"observation_layers=3 must be at most the network's 2 layers"):
        network(policy_of("deep_forcing", observation_layers=3))
