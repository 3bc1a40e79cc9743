"""The text encoder: what padding, order and precision do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.wan.config import UMT5_XXL, UMT5Config
from rcm_jax.wan.umt5 import UMT5, relative_buckets

SMALL = UMT5Config(vocabulary=50, dim=24, attention_dim=16, ffn_dim=32, num_heads=2, num_layers=3)
IDS = np.random.default_rng(0).integers(1, 50, (2, 7))
MASK = np.array([[1] * 7, [1] * 4 + [0] * 3])


@functools.cache
def params():
    """Every leaf random, each layer its own."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(UMT5(SMALL).init, jax.random.key(0), IDS, MASK)["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.3), jnp.float32), shapes)


def encode(ids=IDS, mask=MASK, params=None, config=SMALL):
    return UMT5(config).apply({"params": globals()["params"]() if params is None else params}, ids, mask)


def test_padding_is_not_seen_and_comes_out_as_zeros():
    out = encode()
    assert not out[1, 4:].any()
    np.testing.assert_allclose(out[1, :4], encode(IDS[1:, :4], MASK[1:, :4])[0], atol=1e-5)
    other = IDS.copy()
    other[1, 4:] = 3
    np.testing.assert_array_equal(encode(other), out)
    hidden = UMT5(SMALL).apply({"params": params()}, IDS, MASK, method="hidden")
    np.testing.assert_array_equal(hidden[0], out[0])
    assert hidden[1, 4:].any()


def test_order_counts_and_every_layer_has_its_own_table():
    out = encode()
    assert np.abs(encode(IDS[:, ::-1])[0, ::-1] - out[0]).max() > 1e-2
    for layer in range(SMALL.num_layers):
        changed = jax.tree.map(lambda p: p, params())
        changed["blocks"]["position"] = params()["blocks"]["position"].at[layer].set(0.0)
        assert np.abs(encode(params=changed) - out).max() > 1e-3


def test_buckets_are_exact_near_and_logarithmic_far():
    buckets = relative_buckets(300, 32, 128)
    row = buckets[150]
    assert row[150] == 0
    np.testing.assert_array_equal(row[150 - 7 : 150], np.arange(7, 0, -1))
    np.testing.assert_array_equal(row[151:158], 16 + np.arange(1, 8))
    np.testing.assert_array_equal(row[150 - np.array([8, 16, 32, 64, 127, 128, 149])], [8, 10, 12, 14, 15, 15, 15])
    np.testing.assert_array_equal(row[151:], 16 + row[150 - np.arange(1, 150)])


def test_bfloat16_weights_run_and_stay_close():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params())
    got = encode(params=half, config=dataclasses.replace(SMALL, dtype="bfloat16"))
    assert got.dtype == jnp.bfloat16
    want = encode()
    assert 1e-4 < np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want) < 5e-2


def test_published_size():
    """The parameter count of the released encoder."""
    shapes = jax.eval_shape(UMT5(UMT5_XXL).init, jax.random.key(0), IDS, MASK)
    assert sum(np.prod(p.shape) for p in jax.tree.leaves(shapes)) == 5_680_910_336


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"ids \(2, 7\) and mask \(2, 6\) must be \[B, L\]"):
        encode(mask=MASK[:, :6])
    with pytest.raises(ValueError, match="attention_dim=16 must be divisible by num_heads=3"):
        dataclasses.replace(SMALL, num_heads=3)
    assert np.isnan(encode(np.full_like(IDS, 50))).any()
