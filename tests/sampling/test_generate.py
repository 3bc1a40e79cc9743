"""From prompts to videos: noise by (seed, index), whatever the batch."""

import jax
import numpy as np
import pytest

from rcm_jax.sampling.generate import SamplerConfig, draw_noise, generate
from rcm_jax.wan.networks import init_params
from rcm_jax.worlds.world import open_world
from tests.tiny import MODEL

PROMPTS = ["a red circle moving left", "a blue square moving up", "a green diamond moving right"]


def videos(sampler, prompts=PROMPTS, **kwargs):
    params = init_params(MODEL, jax.random.key(3))
    return generate(params, MODEL, open_world("toy"), prompts, latent_shape=(9, 6, 6), sampler=sampler, **kwargs)


@pytest.mark.parametrize("sampler", [SamplerConfig("few_step", 2), SamplerConfig("unipc", 3)])
def test_videos_do_not_depend_on_the_batch(sampler):
    whole = videos(sampler, seed=5)
    assert whole.shape == (3, 9, 24, 24, 3)
    assert np.abs(whole).max() <= 1
    np.testing.assert_allclose(videos(sampler, seed=5, batch_size=2), whole, atol=1e-5)
    np.testing.assert_allclose(videos(sampler, PROMPTS[:2], seed=5), whole[:2], atol=1e-5)
    assert np.abs(videos(sampler, seed=6) - whole).max() > 0.1


def test_noise_of_a_video_is_its_own():
    noise = draw_noise(1, [0, 3, 4], (2, 5))
    np.testing.assert_array_equal(noise[1], draw_noise(1, [3], (2, 5))[0])
    assert np.abs(np.corrcoef(draw_noise(1, range(200), (50,)))[0, 1:]).max() < 0.6


@pytest.mark.parametrize("num_steps", [0, 5, -1])
def test_students_take_one_to_four_steps(num_steps):
    with pytest.raises(ValueError, match=rf"{num_steps}.*1.*4"):
        SamplerConfig("few_step", num_steps)


def test_unknown_samplers_and_worlds_list_the_known():
    with pytest.raises(ValueError, match="ddim.*unipc"):
        SamplerConfig("ddim")
    with pytest.raises(ValueError, match="'mars' is unknown.*'toy'"):
        open_world("mars")
    with pytest.raises(ValueError, match="purple.*red"):
        videos(SamplerConfig("few_step", 1), ["a purple circle moving left"])
