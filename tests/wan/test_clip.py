"""CLIP's image tower and what an image goes through before it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.wan.clip import CLIP, MEAN, STD, preprocess
from rcm_jax.wan.config import CLIP_VIT_H, CLIPConfig

SMALL = CLIPConfig(dim=16, num_heads=2, num_layers=2, image_size=12, patch_size=4)
IMAGES = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)


@functools.cache
def params():
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(CLIP(SMALL).init, jax.random.key(0), IMAGES)["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.3), jnp.float32), shapes)


def tokens(images=IMAGES, params=None, config=SMALL):
    return CLIP(config).apply({"params": globals()["params"]() if params is None else params}, images)


def test_class_token_then_patches_by_row_and_column():
    """Without attention's values a token sees its own patch alone."""
    blind = jax.tree.map(lambda p: p, params())
    qkv = params()["blocks"]["qkv"]
    blind["blocks"]["qkv"] = {"kernel": qkv["kernel"].at[:, :, 32:].set(0.0), "bias": qkv["bias"].at[:, 32:].set(0.0)}
    changed = IMAGES.copy()
    changed[:, 4:8, 8:12] += 1.0
    moved = np.abs(tokens(changed, blind) - tokens(params=blind)).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(moved), [1 + 1 * 3 + 2])
    assert (np.abs(tokens(changed) - tokens()).max(axis=(0, 2)) > 1e-6).all()


def test_samples_of_a_batch_do_not_touch():
    np.testing.assert_allclose(tokens(IMAGES[1:]), tokens()[1:], atol=1e-5)


def test_bfloat16_weights_run_and_stay_close():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params())
    got = tokens(params=half, config=dataclasses.replace(SMALL, dtype="bfloat16"))
    assert got.dtype == jnp.bfloat16
    assert 1e-4 < np.linalg.norm(np.asarray(got, np.float32) - tokens()) / np.linalg.norm(tokens()) < 5e-2


def test_preprocessing_makes_a_normalised_square():
    image = jnp.stack([jnp.full((20, 30), v) for v in (-1.0, 0.0, 1.0)], axis=-1)[None]
    out = preprocess(image, 8)
    assert out.shape == (1, 8, 8, 3)
    want = (np.array([0.0, 0.5, 1.0]) - MEAN) / STD
    np.testing.assert_allclose(out, np.broadcast_to(want, out.shape), atol=1e-5)


def test_tokens_of_the_published_tower():
    """257 tokens of 1280; the weights of a ViT-H/14 but for its last block, norm and projection."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(CLIP(CLIP_VIT_H).init, jax.random.key(0), image)
    assert jax.eval_shape(CLIP(CLIP_VIT_H).apply, variables, image).shape == (1, 257, 1280)
    block = 12 * 1280**2 + 13 * 1280
    rest = 3 * 14 * 14 * 1280 + 1280 + 257 * 1280 + 2 * 1280
    assert sum(np.prod(p.shape) for p in jax.tree.leaves(variables)) == 31 * block + rest


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"image has shape \(1, 8, 12, 3\); give \[B, 12, 12, 3\]"):
        tokens(np.zeros((1, 8, 12, 3)))
    with pytest.raises(ValueError, match="image_size=12 must be divisible by patch_size=5"):
        dataclasses.replace(SMALL, patch_size=5)
