"""Resizing against its definition; where networks find an image: in channels behind the noise, or as first frame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.wan.dit import begin_with, velocity
from rcm_jax.wan.image import image_condition, resize_bicubic

RNG = np.random.default_rng(0)


def test_the_kernel_is_pytorchs():
    """One bright pixel at twice the size: the kernel with slope -0.75 at distances of 1/4, 3/4, 5/4 and 7/4."""
    image = jnp.zeros((9, 11, 1)).at[4, 5].set(1.0)
    half = np.array([-0.03515625, -0.10546875, 0.26171875, 0.87890625])
    kernel = np.concatenate([half, half[::-1]])
    want = np.zeros((18, 22))
    want[5:13, 7:15] = np.outer(kernel, kernel)
    np.testing.assert_allclose(resize_bicubic(image, (18, 22))[..., 0], want, atol=1e-7)


def test_the_border_repeats():
    image = jnp.concatenate([jnp.zeros((6, 3, 1)), jnp.ones((6, 3, 1))], axis=1)
    out = resize_bicubic(image, (4, 13))
    np.testing.assert_allclose(out[:, 0], 0, atol=1e-6)
    np.testing.assert_allclose(out[:, -1], 1, atol=1e-6)
    assert np.abs(out - out[:1]).max() < 1e-6


def test_the_size_of_the_image_itself_changes_nothing():
    image = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    np.testing.assert_allclose(resize_bicubic(image, (6, 7)), image, atol=1e-6)


def test_the_condition_is_mask_then_latents_of_the_image_and_grey():
    seen = []

    def encode(video):
        seen.append(video)
        return jnp.full((2, 3, 4, 5, 16), 7.0)

    image = jax.random.normal(jax.random.key(0), (2, 32, 40, 3))
    out = image_condition(encode, image, frames=9)
    assert out.shape == (2, 3, 4, 5, 20)
    np.testing.assert_array_equal(seen[0][:, 0], image)
    assert seen[0].shape == (2, 9, 32, 40, 3)
    assert not seen[0][:, 1:].any()
    assert (out[:, 0, ..., :4] == 1).all()
    assert (out[:, 1:, ..., :4] == 0).all()
    assert (out[..., 4:] == 7).all()


class Times:
    """A network whose velocity is x times the time that each latent frame has."""

    def apply(self, _, x, t, text, image):
        assert (text, image) == ("text", None)
        return x * t[:, :, None, None, None] / 1000


@pytest.mark.parametrize("times", [np.float32([0.5, 0.25]), np.float32([[0.5] * 3, [0.25] * 3])], ids=["B", "BT"])
def test_the_first_latent_frames_are_clean_at_time_0(times):
    x, first = (RNG.normal(size=(n, t, 2, 2, 4)).astype(np.float32) for n, t in ((2, 3), (1, 1)))
    got = velocity(Times(), {}, "text", first=jnp.asarray(first))(jnp.asarray(x), jnp.asarray(times))
    np.testing.assert_array_equal(got[:, :1], np.zeros_like(x[:, :1]))
    scale = np.float32([0.5, 0.25])[:, None, None, None, None]
    np.testing.assert_allclose(got[:, 1:], x[:, 1:] * scale, rtol=1e-6)
    begun = begin_with(jnp.asarray(first), jnp.asarray(x))
    np.testing.assert_array_equal(begun, np.concatenate([first.repeat(2, 0), x[:, 1:]], axis=1))
    assert begin_with(None, x) is x
