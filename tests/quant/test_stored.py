"""Chunks stored and restored: every axis and smoothing, padding, bytes, clusters that go on, and one program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.quant import (
    QuantConfig,
    bytes_a_token,
    clusters,
    groups,
    laid_by_token,
    nbytes,
    restore,
    restore_float32,
    smoothing,
    store,
)
from tests.benchmarks import relative

SHAPE = (2, 10, 2, 16)
AXES = ("token", "channel", "head", "tensor")
WAYS = ("none", "clip", "balance", "hadamard", "reorder", "qvg")


def chunk(seed=0, shape=SHAPE):
    """Channels of unlike size about unlike means."""
    rng = np.random.default_rng(seed)
    size = np.exp(np.random.default_rng(9).normal(size=shape[2:]))
    return jnp.asarray(size * (rng.normal(size=shape) + 1), jnp.float32)


def config(**settings):
    return QuantConfig(**{"dtype": "int8", "granularity": "token", "group_size": 8, "qvg_clusters": 3} | settings)


@pytest.mark.parametrize("granularity", AXES)
@pytest.mark.parametrize("group_size", [0, 3, 8, 4096])
def test_grouping_has_an_inverse(granularity, group_size):
    """Padded with zeros to whole groups; whatever the size, every number is there once."""
    x = chunk()
    grouped = groups.to_groups(x, granularity, group_size)
    assert grouped.shape == groups.group_shape(SHAPE, granularity, group_size)
    assert jnp.count_nonzero(grouped) == x.size
    np.testing.assert_array_equal(groups.from_groups(grouped, SHAPE, granularity), x)


@pytest.mark.parametrize(("granularity", "rows"), [("token", 40), ("channel", 64), ("head", 4), ("tensor", 2)])
def test_an_axis_has_its_rows(granularity, rows):
    """A number that is changed moves the scale of its own row alone."""
    x, whole = chunk(), config(granularity=granularity, group_size=0)
    before, after = (store(y, whole)[0].scale.astype(jnp.float32) for y in (x, x.at[1, 4, 1, 5].set(1e3)))
    assert before.shape == (rows, 1, 1)
    assert jnp.count_nonzero(before != after) == 1


@pytest.mark.parametrize("way", WAYS)
def test_one_program_and_none_agree(way):
    """Every byte is the same under jit; what comes back, to float32's rounding."""
    given, x = config(smoothing=way, dtype="int4"), chunk()
    alone, _ = store(x, given)
    compiled, _ = jax.jit(store, static_argnums=1)(x, given)
    jax.tree.map(np.testing.assert_array_equal, alone, compiled)
    np.testing.assert_allclose(jax.jit(restore_float32)(compiled), restore_float32(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", [w for w in WAYS if w != "clip"])
def test_smoothing_is_taken_back(way):
    """In bfloat16, where codes add no error of their own, x comes back to bfloat16's rounding, channel by channel."""
    stored, _ = store(chunk(), config(dtype="bf16", smoothing=way))
    assert stored.scale is None
    assert relative(restore_float32(stored), chunk()) < 4e-3
    assert restore(stored).dtype == jnp.bfloat16


def test_clipping_keeps_a_share():
    x = chunk()
    stored, _ = store(x, config(dtype="bf16", smoothing="clip", clip_percentile=0.9))
    cut = np.abs(np.asarray(restore_float32(stored))) < np.abs(np.asarray(x)) * (1 - 2**-8)
    np.testing.assert_allclose(cut.mean(axis=(1, 3)), 0.1, atol=0.01)


@pytest.mark.parametrize("way", ["hadamard", "balance", "qvg"])
def test_smoothing_helps_where_channels_are_unlike(way):
    x = chunk(shape=(1, 64, 2, 16))
    plain, smooth = (store(x, config(dtype="int2", group_size=0, smoothing=s))[0] for s in ("none", way))
    assert relative(restore_float32(smooth), x) < 0.85 * relative(restore_float32(plain), x)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_scale_that_is_rounded_first_costs_no_error(dtype):
    """All within half a step of the stored scale; numbers too small for a published scale stay, in the same bytes."""
    x = chunk().at[:, :, 0].multiply(2.0**-8)
    published, first = (store(x, config(dtype=dtype, scale_rounding=s))[0] for s in ("after", "before"))
    step = np.repeat(np.asarray(first.scale.astype(jnp.float32)), 8, axis=2).reshape(SHAPE)
    assert (np.abs(restore_float32(first) - x) <= 0.5001 * step).all()
    assert nbytes(first) == nbytes(published)
    if dtype == "int8":
        assert not np.asarray(restore_float32(published))[:, :, 0].all()
        assert relative(restore_float32(first), x) < 0.3 * relative(restore_float32(published), x)


def test_hadamard_is_orthonormal_and_its_own_inverse():
    x = chunk()
    y = smoothing.hadamard(x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(smoothing.hadamard(y), x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(smoothing.hadamard(jnp.ones((1, 1, 1, 4))), [[[[2.0, 0, 0, 0]]]])


def test_constant_chunks_and_zeros():
    """All tokens alike: one cluster holds them, and nothing is left to code. Zeros come back as zeros, never NaN."""
    same = jnp.broadcast_to(chunk()[:, :1], SHAPE)
    stored, _ = store(same, config(smoothing="qvg", dtype="int2"))
    assert not stored.undo[0].assignments.any()
    assert relative(restore_float32(stored), same) < 4e-3
    for way in WAYS:
        stored, _ = store(jnp.zeros(SHAPE), config(smoothing=way, dtype="int4"))
        assert not np.asarray(restore_float32(stored)).any(), way


def test_clusters_find_what_is_there():
    """Tokens about three directions, one cluster each, from wherever k-means starts; empty ones stay empty."""
    rng = np.random.default_rng(0)
    which = np.array([0, 0, 1, 1, 2, 2, 0, 1, 2, 0])
    directions = 10 * rng.normal(size=(3, 16))
    x = jnp.asarray(directions[which] + 0.01 * rng.normal(size=(10, 16)), jnp.float32)[None, :, None]
    left, stages, _ = clusters.subtract(x, config(qvg_clusters=8), ())
    groups_found = {frozenset(np.flatnonzero(np.asarray(stages[0].assignments[0]) == i)) for i in range(8)} - {
        frozenset()
    }
    for found in groups_found:  # no cluster mixes directions
        assert len({which[i] for i in found}) == 1
    assert float(jnp.abs(left).max()) < 0.1
    np.testing.assert_allclose(clusters.add(left, stages), x, rtol=1e-2, atol=1e-2)


def test_clusters_start_at_evenly_spaced_tokens():
    """Halves go to the even token: 8.5 to 8."""
    assert clusters.spaced(18, 5).tolist() == [0, 4, 8, 13, 17]
    assert clusters.spaced(24, 6).tolist() == [0, 5, 9, 14, 18, 23]
    assert clusters.spaced(7, 7).tolist() == list(range(7))
    assert clusters.spaced(9, 1).tolist() == [0]


@pytest.mark.slow
def test_the_last_chunk_warms_the_next():
    """Where it may, and where its number of clusters is the same: one round twice is then two rounds."""
    given = config(smoothing="qvg", qvg_iters=1, qvg_stages=2)
    x = chunk(shape=(2, 40, 2, 16))
    cold, warm = store(x, given)
    assert [w.shape for w in warm] == [(2, 3, 16)] * 2
    assert all(w.dtype == jnp.bfloat16 for w in warm)
    again, _ = store(x, given, warm)
    two, _ = store(x, dataclasses.replace(given, qvg_iters=2))
    np.testing.assert_array_equal(again.undo[0].assignments, two.undo[0].assignments)
    assert (cold.undo[0].assignments != two.undo[0].assignments).any()
    short = x[:, :2]
    jax.tree.map(np.testing.assert_array_equal, store(short, given, warm)[0], store(short, given)[0])
    off = dataclasses.replace(given, qvg_warm_start=False)
    stored, none = store(x, off, warm)
    assert none == ()
    np.testing.assert_array_equal(stored.payload, cold.payload)


def test_a_chunk_in_a_loop():
    """Clusters are a loop's state, and a chunk is a pytree: layers map over it, as over any array."""
    given = config(smoothing="qvg", dtype="int2", qvg_share_assignments=False)
    layers = jnp.stack([chunk(0), chunk(1)])
    stored, warm = jax.jit(jax.vmap(lambda x: store(x, given)))(layers)
    assert warm[0].shape == (2, 2, 2, 3, 16)
    one, _ = store(layers[1], given)
    np.testing.assert_array_equal(stored.payload[1], one.payload)
    np.testing.assert_allclose(jax.vmap(restore_float32)(stored)[1], restore_float32(one), rtol=1e-6, atol=1e-6)


# SPEC: bytes a token of 12 heads of 128 in groups of 64, payload and scales, of a chunk of 4680 tokens
BYTES = [
    ({"dtype": "bf16"}, 3072),
    ({"dtype": "int8"}, 1536 + 24),
    ({"dtype": "fp8"}, 1536 + 24),
    ({"dtype": "int4"}, 768 + 24),
    ({"dtype": "fp4"}, 768 + 24),
    ({"dtype": "int2"}, 384 + 24),
    ({"dtype": "int2", "granularity": "channel"}, (384 + 24) * 74 * 64 / 4680),
    ({"dtype": "int2", "smoothing": "qvg", "qvg_clusters": 256}, 384 + 24 + 256 * 1536 * 2 / 4680 + 1),
    (
        {"dtype": "int2", "smoothing": "qvg", "qvg_clusters": 256, "qvg_share_assignments": False},
        408 + 256 * 1536 * 2 / 4680 + 12,
    ),
    ({"dtype": "int2", "smoothing": "qvg", "qvg_clusters": 257}, 384 + 24 + 257 * 1536 * 2 / 4680 + 2),
]


@pytest.mark.parametrize(("settings", "expected"), BYTES)
def test_bytes_are_those_of_the_arithmetic(settings, expected):
    assert bytes_a_token(config(**{"group_size": 64} | settings), 4680, 12, 128) == pytest.approx(expected, abs=0.01)


def test_bytes_are_real():
    """What is counted is what lies there."""
    given = config(dtype="int2", smoothing="qvg")
    stored, _ = store(chunk(), given)
    assert nbytes(stored) == sum(x.nbytes for x in jax.tree.leaves(stored))
    assert stored.payload.dtype == jnp.uint8
    assert stored.payload.nbytes == chunk().size // 4
    assert nbytes(store(chunk()[:1], given)[0]) == pytest.approx(10 * bytes_a_token(given, 10, 2, 16))


@pytest.mark.parametrize(
    ("granularity", "group_size"),
    [("token", 8), ("token", 0), ("channel", 4), ("channel", 5), ("channel", 0), ("head", 8), ("head", 48), ("head", 0),
     ("tensor", 16), ("tensor", 64), ("tensor", 0)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["fp4", *(pytest.param(x, marks=pytest.mark.slow) for x in ("int8", "fp8", "int2"))])
def test_what_is_laid_by_token_comes_back_the_same(dtype, granularity, group_size):
    """To the bit, whatever tokens and channels share a scale, with groups cut short; in no more bytes, but that each
    head has its copy of a scale of all."""

    @jax.jit
    def both(x):
        stored, _ = store(x, config(dtype=dtype, granularity=granularity, group_size=group_size))
        laid = laid_by_token(stored)
        assert laid.by_token
        assert laid_by_token(laid) is laid
        assert nbytes(laid) <= nbytes(stored) + (SHAPE[2] - 1) * stored.scale.size * (granularity == "tensor")
        return restore_float32(stored), restore_float32(laid)

    np.testing.assert_array_equal(*both(chunk()))


def test_a_row_is_a_tokens():
    """A number that is changed, though not its group's greatest, changes a byte of its own token's head alone."""
    given = config(dtype="int4", granularity="channel", group_size=5)
    x = chunk().at[1, 8, 1, 5].set(0.0)
    one, other = (laid_by_token(store(y, given)[0]).payload for y in (x, x.at[1, 8, 1, 5].set(-0.6)))
    assert one.shape == (2, 10, 2, 8)
    assert np.argwhere(np.asarray(one != other)).tolist() == [[1, 8, 1, 2]]


@pytest.mark.parametrize("given", [
    config(smoothing="hadamard"), config(smoothing="qvg"), config(granularity="head", group_size=24),
    config(granularity="tensor", group_size=48),
])  # fmt: skip
def test_what_stays_as_published(given):
    """What a kernel cannot read: a smoothing to be undone, groups that are not of whole tokens."""
    stored, _ = store(chunk(), given)
    assert laid_by_token(stored) is stored


HEADS_APART = [config(dtype="int4", granularity=axis, smoothing=way) for axis, way in (
    ("token", "none"), ("channel", "balance"), ("head", "clip"), ("token", "reorder"), ("channel", "qvg"),
)]  # fmt: skip


@pytest.mark.parametrize("given", HEADS_APART, ids=lambda c: f"{c.granularity}-{c.smoothing}")
def test_heads_stored_apart_come_back_the_same(given):
    """Shared clusters are of the mean over the heads of all parts."""
    x = chunk()
    parts = jnp.stack(jnp.split(x, 2, axis=2))
    stored, _ = jax.vmap(lambda part: store(part, given, heads_axis="heads"), axis_name="heads")(parts)
    assert not given.crosses_heads
    got = jnp.concatenate(list(jax.vmap(restore)(stored)), axis=2)
    np.testing.assert_array_equal(got, restore(store(x, given)[0]))


def test_groups_of_a_tensor_cross_heads():
    assert config(dtype="int4", granularity="tensor").crosses_heads
    assert not config(dtype="bf16", granularity="tensor").crosses_heads


def test_zeros_are_no_centres():
    """A cache's state before its first chunk: clusters start as without one."""
    given = config(dtype="int2", smoothing="qvg")
    stored, warm = store(chunk(), given)
    again, _ = store(chunk(), given, tuple(map(jnp.zeros_like, warm)))
    for one, other in zip(jax.tree.leaves(stored), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
