"""Rotary positions and the time embedding against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.wan.rope import apply_rope, axis_widths, rope_table, time_embedding


@pytest.mark.parametrize("width", [12, 24, 32, 64, 128])
def test_axis_widths_fill_the_head(width):
    frame, row, column = axis_widths(width)
    assert frame + row + column == width
    assert row == column == 2 * (width // 6)


def test_rope_rotates_pairs_by_position_times_frequency():
    grid, width = (3, 2, 4), 24
    x = np.random.default_rng(0).normal(size=(1, 24, 1, width))
    got = apply_rope(jnp.asarray(x, jnp.float32), rope_table(grid, width))[0, :, 0]
    frequencies = [10000.0 ** (-np.arange(0, w, 2) / w) for w in axis_widths(width)]
    for token, place in enumerate(np.ndindex(grid)):
        angle = np.concatenate([p * f for p, f in zip(place, frequencies, strict=True)])
        rotated = (x[0, token, 0, 0::2] + 1j * x[0, token, 0, 1::2]) * np.exp(1j * angle)
        np.testing.assert_allclose(got[token, 0::2], rotated.real, atol=1e-6)
        np.testing.assert_allclose(got[token, 1::2], rotated.imag, atol=1e-6)


def test_rope_scores_depend_on_distance_alone():
    table = rope_table((8, 1, 1), 16)
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 16)) for i in range(2))
    q, k = (apply_rope(jnp.broadcast_to(x, (1, 8, 1, 16)), table)[0, :, 0] for x in (q, k))
    scores = q @ k.T
    np.testing.assert_allclose(jnp.diagonal(scores, 2), jnp.full(6, scores[0, 2]), atol=1e-5)


@pytest.mark.parametrize("width", [32, 256])
def test_time_embedding_matches_float64_at_large_times(width):
    """A plain float32 product is off by 3e-5 at t = 1000; the published network takes the angle in float64."""
    t = np.float32(np.linspace(0, 1000, 4001))
    angle = t.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    want = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    assert np.abs(jax.jit(time_embedding, static_argnums=1)(t, width) - want).max() < 1e-6


def test_time_embedding_derivative():
    t, dt = jnp.array([3.0, 700.0]), jnp.array([1.0, -2.0])
    _, tangent = jax.jvp(lambda t: time_embedding(t, 32), (t,), (dt,))
    frequency = 10000.0 ** (-np.arange(16) / 16)
    angle = np.asarray(t, np.float64)[:, None] * frequency
    want = np.concatenate([-np.sin(angle), np.cos(angle)], -1) * np.tile(frequency, 2) * np.asarray(dt)[:, None]
    np.testing.assert_allclose(tangent, want, atol=2e-6)
    pulled = jax.vjp(lambda t: time_embedding(t, 32), t)[1](jnp.ones((2, 32)))[0]
    np.testing.assert_allclose(pulled * dt, want.sum(-1), rtol=1e-4)


def test_a_table_may_have_a_row_a_sample():
    """Traced or known: each sample turns as by a table of its own."""
    x, grid = jax.random.normal(jax.random.key(1), (3, 2 * 6, 2, 16)), (2, 2, 3)
    rows = np.array([[0, 1], [7, 8], [3000, 3001]])
    want = np.concatenate([apply_rope(x[i : i + 1], rope_table(grid, 16, row)) for i, row in enumerate(rows)])
    for table in (rope_table(grid, 16, rows), jax.jit(lambda f: rope_table(grid, 16, f))(rows)):
        assert table[0].shape == (3, 12, 8)
        np.testing.assert_allclose(apply_rope(x, table), want, atol=2e-6)
