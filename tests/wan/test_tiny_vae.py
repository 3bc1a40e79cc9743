"""The tiny autoencoder in pieces and whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.wan.config import TinyVAEConfig
from rcm_jax.wan.tiny_vae import TinyVAE
from tests.wan.tiny import pieces

SMALL = TinyVAEConfig(decoder_widths=(8, 6, 5, 4), encoder_width=7, z_dim=3)
TINY = TinyVAE(SMALL)
VIDEO = np.random.default_rng(0).uniform(-1, 1, (2, 10, 16, 24, 3)).astype(np.float32)
LATENTS = np.random.default_rng(1).normal(size=(2, 4, 2, 3, 3)).astype(np.float32)


@functools.cache
def params():
    """Random, as large as keeps the frames inside the range that they are clipped to, most of them."""
    rng = np.random.default_rng(2)

    def draw(leaf):
        if leaf.ndim == 1:
            return rng.normal(size=leaf.shape, scale=0.1, loc=0.3)
        return rng.normal(size=leaf.shape, scale=0.7 * np.prod(leaf.shape[:-1]) ** -0.5)

    shapes = jax.eval_shape(TINY.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: draw(leaf).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def whole():
    return np.asarray(TINY.decode(params(), LATENTS))


@pytest.mark.parametrize("lengths", [(4,), (1, 3), (2, 2)])
def test_decoding_in_chunks_is_decoding(whole, lengths):
    got, states = pieces(params(), TINY.decode_chunk, LATENTS, lengths)
    assert got.shape == (2, 13, 16, 24, 3)
    inside = np.abs(whole) < 1
    assert 0.5 < inside.mean() < 1  # some of it is clipped, and most not
    np.testing.assert_allclose(got, whole, atol=2e-5)
    shapes = [jax.tree.map(jnp.shape, state) for state in states]
    assert all(s == shapes[0] for s in shapes)


@pytest.mark.parametrize("lengths", [(12,), (4, 8)])
def test_encoding_in_chunks_is_encoding_of_the_clip_whose_last_frame_stays(lengths):
    padded = np.concatenate([VIDEO, VIDEO[:, -1:], VIDEO[:, -1:]], axis=1)
    got, _ = pieces(params(), TINY.encode_chunk, padded, lengths)
    assert got.shape == (2, 3, 2, 3, 3)
    np.testing.assert_allclose(got, TINY.encode(params(), VIDEO), atol=2e-5)


def test_the_stream_gives_one_frame_then_four_of_the_past_and_present_alone(whole):
    other = LATENTS.copy()
    other[:, 2:] = 0.0
    parts = [np.asarray(part) for part in TINY.stream(params(), other)]
    assert [p.shape[1] for p in parts] == [1, 4, 4, 4]
    np.testing.assert_array_equal(np.concatenate(parts[:2], axis=1), whole[:, :5])
    assert np.abs(parts[2] - whole[:, 5:9]).max() > 1e-3


def test_the_past_is_seen(whole):
    alone = np.asarray(TINY.decode(params(), LATENTS[:, 1:2]))
    assert np.abs(alone[:, 0] - whole[:, 4]).max() > 1e-3


def test_frames_stay_in_range_however_large_the_latents():
    large = 1e3 * np.sign(LATENTS)
    video = np.asarray(TINY.decode(params(), large))
    assert np.abs(video).max() <= 1
    np.testing.assert_allclose(video, TINY.decode(params(), 10 * large), atol=1e-6)  # tanh has them both at 3


@pytest.mark.long
def test_bfloat16_weights_run_and_stay_close(whole):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params())
    got = TinyVAE(dataclasses.replace(SMALL, dtype="bfloat16")).decode(half, LATENTS)
    assert got.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(got - whole) / np.linalg.norm(whole) < 5e-2


@pytest.mark.parametrize("shape", [(1, 2, 4, 4, 16), (1, 0, 4, 4, 3)])
def test_latents_that_do_not_fit_are_named(shape):
    with pytest.raises(ValueError, match=r"latents have shape .* give \[B, at least 1, H, W, 3\]"):
        TINY.decode(params(), jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 12, 16, 3), (1, 4, 16, 18, 3), (1, 4, 16, 16, 4), (1, 0, 16, 16, 3)])
def test_a_video_that_does_not_fit_is_named(shape):
    with pytest.raises(ValueError, match=r"video has shape .* give \[B, 4k, 8H, 8W, 3\]"):
        TINY.encode(params(), jnp.zeros(shape))


def test_a_chunk_of_other_than_four_frames_is_named():
    with pytest.raises(ValueError, match=r"video has shape \(2, 3, .* give \[B, 4k, 8H, 8W, 3\]"):
        TINY.encode_chunk(params(), VIDEO[:, :3])


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="need an entry between two of decoder_widths"):
        TinyVAEConfig(decoder_time=(1, 2))
