"""Training from images: what a batch is made of, and that the network learns to look."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.configs.base import run_config
from rcm_jax.data.batch import Batch
from rcm_jax.objectives.config import TimeSamplerConfig
from rcm_jax.objectives.networks import Networks
from rcm_jax.recipes import read_config
from rcm_jax.training.abstract import abstract_batch
from rcm_jax.training.state import init_state
from rcm_jax.training.step import make_steps
from tests.tiny import IMAGE_TOKENS, MODEL, tiny_run

I2V = dataclasses.replace(MODEL, num_layers=1, remat="none", in_channels=MODEL.out_channels + 12, image_dim=6)
STEPS, LR = 30, 1e-2


def config(lr=LR):
    """Times near noise, from which a video cannot be told."""
    method = {"name": "diffusion", "p_G": TimeSamplerConfig("lognormal", 3.0, 0.5)}
    optimizer = {"lr": lr, "b1": 0.9, "warmup_updates": 0, "weight_decay": 0.0}
    made = tiny_run(method=method, optimizer=optimizer, model=I2V)
    data = dataclasses.replace(made.data, latent_shape=(2, 4, 4), batch_size=8)
    return dataclasses.replace(made, data=data)


@pytest.fixture(scope="module")
def losses():
    return trained(config())


def trained(made):
    """Losses of thirty steps on a batch whose conditions are its videos, and on one where they are others."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=(8, *shape)).astype(np.float32)

    def grey():
        return np.repeat(3 * normal(2, 4, 4, 1), 12, axis=-1)

    video, other = grey(), grey()
    text, image = normal(MODEL.text_len, MODEL.text_dim), normal(IMAGE_TOKENS, 6)
    step = make_steps(made, np.zeros((MODEL.text_len, MODEL.text_dim), np.float32))["diffusion"]

    def train(condition):
        state, batch, out = init_state(made, None), Batch(video, text, condition, image), []
        for _ in range(STEPS):
            state, metrics = step(state, Networks(), batch)
            out.append(float(metrics["loss_diffusion"]))
        return np.array(out)

    return train(video), train(other)


@pytest.mark.slow
def test_a_fixed_batch_with_conditions_is_learnt(losses):
    own, _ = losses
    assert own[-3:].mean() < 0.5 * own[:3].mean()


def test_what_is_learnt_comes_from_the_condition(losses):
    own, others = losses
    assert own[-3:].mean() < 0.7 * others[-3:].mean()


@pytest.mark.parametrize("name", ["wan_14b_i2v_rcm", "wan22_i2v_high_rcm", "wan22_i2v_low_rcm"])
def test_what_a_recipe_is_planned_with(name):
    """Noise of 16 channels, mask and picture of 20, and CLIP's 257 tokens where the network takes them."""
    c = run_config(read_config(name, []))
    batch, grid = abstract_batch(c), (64, 21, 60, 104)
    assert (batch.latents.shape, batch.condition.shape) == ((*grid, 16), (*grid, 20))
    assert (batch.image and batch.image.shape) == ((64, 257, 1280) if name == "wan_14b_i2v_rcm" else None)
    assert all(math.prod(x.shape) and x.dtype == jnp.bfloat16 for x in (batch.latents, batch.condition))  # as stored
