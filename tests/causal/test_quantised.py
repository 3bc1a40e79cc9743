"""The past in few bytes: the published numbers are in the goldens; here where chunks lie, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from rcm_jax.causal.blobs import cache_places
from rcm_jax.causal.cache import Ring
from rcm_jax.causal.network import CausalDiT
from rcm_jax.causal.policies import policy_of
from rcm_jax.causal.quantised import QuantisedRing, quantised
from rcm_jax.causal.sinks import check_cuts
from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.parallel import make_mesh, shard, sharded_attention
from rcm_jax.quant import CacheQuant, QuantConfig, nbytes
from rcm_jax.sampling.rollout import chunk_noises, rollout
from rcm_jax.sampling.schedules import few_step_schedule
from rcm_jax.wan.dit import DiT
from tests.tiny import MODEL as TINY
from tests.tiny import perturbed_params

MODEL = dataclasses.replace(TINY, remat="none", num_layers=2)
HALF = dataclasses.replace(MODEL, dtype="bfloat16")
SIZE = (2, 4)
FRAMES = 9
ATOL = 1e-3  # a chunk at the next frame's position is a hundred times as far
TEXT = jax.random.normal(jax.random.key(3), (2, 5, MODEL.text_dim))
LOSSLESS = QuantConfig("bf16", smoothing="reorder")  # of a network in bfloat16
INT4 = QuantConfig("int4", group_size=6)
QVG = QuantConfig("int4", smoothing="qvg", qvg_clusters=3, group_size=6)


def both(config):
    return CacheQuant(config, config)


def network(policy, pattern="c1-2", model=MODEL, frames=FRAMES, attend=None):
    dit = DiT(model) if attend is None else DiT(model, attend)
    return CausalDiT(dit, ChunkPattern.parse(pattern), frames, SIZE, policy=policy)


def steps(causal, chunks):
    """Velocities of chunks, alone and in the pass that appends them, and the cache after each."""
    params = perturbed_params(causal.dit.config)
    latents = jax.random.normal(jax.random.key(7), (2, 40, *SIZE, MODEL.in_channels))

    @jax.jit
    def step(params, x, cache, chunk):
        t = jnp.full(2, 0.5)
        reads = causal.denoise(params, x, t, prompt, cache, chunk)
        appends, cache = causal.step(params, x, t, prompt, cache, chunk)
        return reads, appends, cache

    prompt, cache, out = causal.prompt(params, TEXT), causal.init_cache(2), []
    for chunk in range(chunks):
        start = causal.pattern.start(chunk)
        x = latents[:, start : causal.pattern.start(chunk + 1)]
        *velocities, cache = step(params, x, cache, jnp.int32(chunk))
        out.append((*velocities, cache))
    return out


@pytest.mark.parametrize(
    ("pattern", "window", "sink"),
    [
        pytest.param("c3-2", 2, 2, marks=pytest.mark.long),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in (("c1-2", None, 0), ("c1-2", 3, 0), ("c3-3", 3, 0), ("c3-3", 1, 1))),
    ],
)  # fmt: skip
def test_where_chunks_lie_is_the_rings_affair(pattern, window, sink):
    """What is stored without loss gives the ring's own velocities, beyond every window, and whatever the first chunk's
    size: a slot, a position or a length that is wrong would change them."""
    ring, chunks = Ring(window, sink), 5 if window is None else 8
    plain = steps(network(ring, pattern, HALF), chunks)
    packed = steps(network(quantised(ring, both(LOSSLESS)), pattern, HALF), chunks)
    for chunk, (want, got) in enumerate(zip(plain, packed, strict=True)):
        for a, b in zip(want[:2], got[:2], strict=True):
            np.testing.assert_allclose(b, a, atol=ATOL, err_msg=f"chunk {chunk}")


@pytest.mark.parametrize(
    ("pattern", "name", "settings"),
    [
        pytest.param(
            "c1-2",
            "infinity_rope",
            dict(cache_blocks=3, sink_blocks=1, f_limit=6, cuts=(3,), flush_interval_blocks=6),
            marks=pytest.mark.slow,
        ),
        pytest.param("c3-2", "infinity_rope", dict(cache_blocks=2, sink_blocks=0, f_limit=6), marks=pytest.mark.slow),
        pytest.param("c3-3", "infinity_rope", dict(cache_blocks=3, sink_blocks=2, f_limit=9), marks=pytest.mark.long),
        pytest.param(
            "c1-2", "rolling_sink", dict(total_blocks=3, sink_blocks=1, recent_blocks=2), marks=pytest.mark.slow
        ),
        pytest.param(
            "c3-2", "rolling_sink", dict(total_blocks=3, sink_blocks=2, recent_blocks=1), marks=pytest.mark.slow
        ),
        pytest.param(
            "c3-3", "rolling_sink", dict(total_blocks=2, sink_blocks=2, recent_blocks=0), marks=pytest.mark.slow
        ),
    ],
)
def test_other_policies_keep_what_they_keep(pattern, name, settings):
    """Through a whole swing of the rolling sink, and beyond cuts and flushes."""
    policy = policy_of(name, **settings)
    plain, packed = (steps(network(p, pattern, HALF), 11) for p in (policy, quantised(policy, both(LOSSLESS))))
    for chunk, (want, got) in enumerate(zip(plain, packed, strict=True)):
        for a, b in zip(want[:2], got[:2], strict=True):
            np.testing.assert_allclose(b, a, atol=ATOL, err_msg=f"chunk {chunk}")


@pytest.fixture(scope="module")
def streamed():
    """Ten chunks of a window of 3 with a sink."""
    return steps(network(quantised(Ring(3, 1), both(QVG)), "c3-3"), 10)


def test_a_chunk_is_stored_once(streamed):
    """A chunk overwrites the oldest slot of the ring; the sink's bytes and the others are as they were."""

    def slot(cache, which):
        return [np.asarray(x[:, which]) for x in jax.tree.leaves(cache.rest)]

    after = [cache for *_, cache in streamed]
    assert _same(slot(after[0], 0), slot(after[9], 0))
    for chunk in (7, 8, 9):
        changed = [not _same(slot(after[chunk - 1], i), slot(after[chunk], i)) for i in range(3)]
        assert changed == [False, chunk % 2 == 1, chunk % 2 == 0]


def _same(one, other):
    return all(map(np.array_equal, one, other))


def test_the_appending_pass_sees_what_is_stored(streamed):
    """Its own chunk, too: the first chunk, which has no past, differs from one that sees itself exactly."""
    reads, appends, _ = streamed[0]
    assert np.abs(reads - appends).max() > 1e-3
    exact, also, _ = steps(network(Ring(3, 1), "c3-3"), 1)[0]
    np.testing.assert_allclose(reads, exact, atol=1e-5)
    np.testing.assert_allclose(also, exact, atol=1e-5)


def test_clusters_start_where_the_last_chunks_ended(streamed):
    """A state a layer, which the first chunk does not have."""
    caches = [cache for *_, cache in streamed[:2]]
    first, second = ([np.asarray(x) for x in jax.tree.leaves(cache.warm)] for cache in caches)
    assert len(first) == 2
    assert all(np.any(x != y) for x, y in zip(first, second, strict=True))
    empty = jax.tree.leaves(network(quantised(Ring(), both(QVG)), "c3-3", frames=9).init_cache(2).warm)
    assert not any(map(np.any, empty))


@pytest.mark.parametrize(("dtype", "least"), [("int8", 2.9), ("int4", 4.7), ("int2", 7.1)])
def test_bytes_are_real(dtype, least):
    """Of a network in float32, with scales for groups of 6 numbers: 4 bytes to 1, 1/2 or 1/4 and 1/6."""
    config = QuantConfig(dtype, granularity="token", group_size=6)
    exact, few = (
        nbytes(jax.eval_shape(lambda c=c: c.init_cache(2)))
        for c in (network(Ring(3)), network(quantised(Ring(3), both(config))))
    )
    assert exact / few > least


def test_no_layer_but_one_is_restored_and_a_chunk_is_written_in_place():
    """The temporary memory of a step does not grow by layers of the past, nor by copies of what is stored."""

    def temporary(layers):
        causal = network(quantised(Ring(), both(INT4)), model=dataclasses.replace(MODEL, num_layers=layers), frames=41)
        params = perturbed_params(causal.dit.config)
        x, t = jnp.zeros((1, 2, *SIZE, MODEL.in_channels)), jnp.zeros(1)
        prompt = jax.eval_shape(lambda: causal.prompt(params, TEXT[:1]))
        cache = jax.eval_shape(lambda: causal.init_cache(1))
        step = jax.jit(causal.step, donate_argnums=4)
        memory = step.lower(params, x, t, prompt, cache, jnp.int32(20)).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= nbytes(cache)
        return memory.temp_size_in_bytes

    layer = 2 * 41 * 2 * MODEL.dim * 4  # keys and values of 41 frames of two tokens
    assert temporary(8) - temporary(2) < 2 * layer


def test_a_cache_of_all_chunks_has_room_for_so_many():
    assert network(quantised(Ring(), both(INT4))).room == FRAMES
    assert network(quantised(Ring(3), both(INT4))).room is None


def test_what_is_exact_is_the_ring_itself():
    assert quantised(Ring(2), CacheQuant()) == quantised(Ring(2), CacheQuant(unrotated=True)) == Ring(2)


def test_a_cut_may_be_requested():
    causal = network(quantised(policy_of("infinity_rope"), both(INT4)))
    cache = jax.eval_shape(lambda: causal.keeps.request_cut(causal.init_cache(1)))
    assert jax.tree.structure(cache) == jax.tree.structure(jax.eval_shape(lambda: causal.init_cache(1)))
    with pytest.raises(ArgumentError, match="cache_policy=QuantisedRing has no cuts"):
        check_cuts(quantised(Ring(), both(INT4)))


@pytest.mark.parametrize("name", ["deep_forcing", "relax_forcing", "memrope"])
def test_policies_that_change_keys_are_refused(name):
    with pytest.raises(ArgumentError, match=r"cache_policy=\w+ does not keep chunks as they came"):
        quantised(policy_of(name), both(INT4))


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ArgumentError, match="group_size=5 must divide the head width, 12"):
        network(quantised(Ring(), both(QuantConfig("int8", granularity="token", group_size=5))))


def test_groups_over_all_heads_are_refused_on_a_mesh_that_cuts_these():
    causal = network(QuantisedRing(Ring(), CacheQuant(values=QuantConfig("int8", granularity="tensor"))))
    with (
        jax.set_mesh(make_mesh(1, 1, 2, devices=jax.devices()[:2])),
        pytest.raises(ArgumentError, match="granularity=tensor is over all heads, which lie on 2 devices"),
    ):
        jax.eval_shape(lambda: causal.init_cache(2))


@pytest.mark.parametrize("policy", [quantised(Ring(3), both(QVG)), policy_of("memrope"), Ring(2)], ids=type)
def test_where_a_cache_lies_on_a_mesh(policy):
    """Is what a dry run takes it to be, which has shapes alone."""
    causal, mesh = network(policy), make_mesh(1, 2, 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: causal.init_cache(2))()
    for x, place in zip(jax.tree.leaves(cache), jax.tree.leaves(cache_places(mesh, cache)), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, place), x.ndim) or x.ndim < 5


@pytest.mark.parametrize(
    "quant",
    [pytest.param(both(INT4), marks=pytest.mark.slow), pytest.param(both(QVG), marks=pytest.mark.long)],
    ids=["int4", "qvg"],
)
def test_heads_stored_apart_on_a_mesh(quant):
    """Each device stores its own heads, shared clusters are means over those of all: the same video."""
    policy, params = quantised(Ring(3), quant), perturbed_params(MODEL)
    noises = chunk_noises(5, jnp.arange(2), 4, (*SIZE, MODEL.in_channels))

    def video(causal, params):
        make = functools.partial(rollout, causal, frames=7)
        return jax.jit(lambda p: make(p, TEXT, noises, few_step_schedule([2])))(params)

    want, mesh = video(network(policy), params), make_mesh(1, 2, 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        got = video(network(policy, attend=sharded_attention(mesh)), shard(params, mesh))
    np.testing.assert_allclose(got, want, atol=2e-5)
