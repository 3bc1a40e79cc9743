"""What sampling takes of a device: the estimate, and what is said where it does not fit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.errors import ArgumentError
from rcm_jax.pipelines import memory
from rcm_jax.pipelines.memory import GIB, Job, check_memory
from rcm_jax.wan.config import WAN_1_3B, WAN_VAE
from rcm_jax.wan.networks import abstract_network
from rcm_jax.wan.vae import VAE
from rcm_jax.worlds.wan.files import open_files
from tests.wan.tiny import write_wan


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return open_files([open_checkpoint(write_wan(tmp_path_factory.mktemp("wan")))])


def published(files, **changes):
    big = dataclasses.replace(
        files,
        dit=(dataclasses.replace(files.dit[0], config=WAN_1_3B),),
        vae=dataclasses.replace(files.vae, config=WAN_VAE),
    )
    return Job(**({"files": big, "size": (832, 480), "num_frames": 77} | changes))


def test_1_3b_at_480p_fits_24_gb(files):
    check_memory(published(files), int(0.75 * 24e9))
    check_memory(published(files, size=(1280, 720), num_frames=81), None)


@pytest.mark.parametrize(
    ("changes", "limit", "fitting"),
    [
        ({"size": (1280, 720)}, 14, ["--vae_tiling", "--resolution=480p"]),
        ({}, 5, ["--vae_tiling"]),
        ({"size": (1280, 720), "tiled": True, "num_frames": 401}, 14, ["--num_frames=", "--sequence=4"]),
        ({"dtype": "float32", "tiled": True}, 8, ["--dtype=bfloat16"]),
        ({}, 0.1, ["nothing of this network"]),
    ],
)
def test_what_does_not_fit_says_what_would(files, changes, limit, fitting):
    job = published(files, **changes)
    with pytest.raises(ArgumentError, match="takes about the network") as error:
        check_memory(job, int(limit * GIB))
    for words in fitting:
        assert words in error.value.as_flags()
        assert words.lstrip("-") in str(error.value)


def test_what_is_said_to_fit_does(files):
    """The largest number of frames, and not one latent frame more."""
    job = published(files, size=(1280, 720), num_frames=401, tiled=True)
    limit = 14 * GIB
    with pytest.raises(ArgumentError, match="would fit") as error:
        check_memory(job, limit)
    frames = error.value.arguments["num_frames"]
    check_memory(dataclasses.replace(job, num_frames=frames), limit)
    with pytest.raises(ValueError, match="would fit"):
        check_memory(dataclasses.replace(job, num_frames=frames + 4), limit)


@pytest.mark.optimised
def test_the_estimate_is_near_the_compilers():
    """The autoencoder's features, at a frame of 128 x 128."""
    vae, latents = VAE(WAN_VAE), jax.ShapeDtypeStruct((1, 1, 16, 16, 16), jnp.float32)
    params = abstract_network(WAN_VAE)
    _, state = jax.eval_shape(vae.decode_chunk, params, latents)
    step = jax.jit(functools.partial(VAE.decode_chunk, vae)).lower(params, latents, state).compile()
    temporary = step.memory_analysis().temp_size_in_bytes
    features = 4 * 4 * 96 * 128 * 128
    assert temporary == pytest.approx(memory.PEAK_DECODE * features, rel=0.3)
