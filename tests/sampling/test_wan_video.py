"""From the published files, in miniature, to videos: by the parts, and against the library's own functions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.load import load_params
from rcm_jax.parallel import make_mesh
from rcm_jax.sampling import memory
from rcm_jax.sampling.generate import SamplerConfig, draw_noise, sample_latents
from rcm_jax.sampling.memory import GIB, Job, check_memory
from rcm_jax.sampling.wan_latents import Experts, sample_wan
from rcm_jax.wan.config import WAN_1_3B, WAN_VAE
from rcm_jax.wan.networks import abstract_network
from rcm_jax.wan.umt5 import UMT5
from rcm_jax.wan.vae import VAE
from rcm_jax.worlds.wan.files import open_files
from rcm_jax.worlds.wan.world import WanWorld
from tests.wan.tiny import DIT, NAMES, arrays, save, write_wan

SHAPE = (2, 4, 4)
STUDENT = SamplerConfig("few_step", 2)
PROMPTS = ["a red fox", "two dogs run", "it rains in the snow", "a cat", "a boat"]
FLOAT32 = dataclasses.replace(DIT, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def files(folder):
    return open_files([folder])


@pytest.fixture(scope="module")
def world(files):
    return WanWorld(files, negative_prompt="it rains", dtype="float32")


def experts(files, mesh=None, **kwargs):
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    kwargs = {"boundary": 0.9, "keep_all": False} | kwargs
    return Experts(files.dit, FLOAT32, mesh, dtype="float32", **kwargs)


def latents(files, world, prompts=PROMPTS, sampler=STUDENT, indices=None, mesh=None, **kwargs):
    null = None if sampler.name == "few_step" else world.null_text
    indices = range(len(prompts)) if indices is None else indices
    return sample_wan(
        experts(files, mesh), world.encode_text(prompts), null, indices, latent_shape=SHAPE, sampler=sampler, seed=4,
        **kwargs,
    )  # fmt: skip


def test_prompts_layer_by_layer_are_the_whole_encoders(files, world):
    ids, masks = files.tokenizer(PROMPTS)
    params = load_params(files.text, dtype="float32")
    whole = UMT5(dataclasses.replace(files.text.config, dtype="float32")).apply({"params": params}, ids, masks)
    mine = world.encode_text(PROMPTS)
    assert mine.shape == (5, 512, 24)
    np.testing.assert_allclose(mine, whole, atol=2e-5)
    np.testing.assert_array_equal(world.encode_text(PROMPTS[2:3])[0], mine[2])
    np.testing.assert_array_equal(world.null_text, WanWorld(files, dtype="float32").encode_text(["it rains"])[0])


@pytest.mark.parametrize("sampler", [STUDENT, SamplerConfig("unipc", 3, guidance=4.0)])
def test_the_loop_of_the_host_is_the_scan(files, world, sampler):
    noise = draw_noise(4, range(5), (sampler.noises, *SHAPE, 16))
    params = load_params(files.dit[0], dtype="float32")
    scanned = sample_latents(
        params, world.encode_text(PROMPTS), world.null_text, noise, model=FLOAT32, sampler=sampler
    )  # fmt: skip
    np.testing.assert_allclose(latents(files, world, sampler=sampler), scanned, atol=1e-4)


def test_a_video_does_not_depend_on_its_batch(files, world):
    whole = latents(files, world)
    np.testing.assert_array_equal(latents(files, world, PROMPTS[3:], indices=[3, 4]), whole[3:])
    pairs = latents(files, world, batch_size=2)
    np.testing.assert_array_equal(latents(files, world, PROMPTS[1:4], indices=[1, 2, 3], batch_size=2), pairs[1:4])
    np.testing.assert_allclose(pairs, whole, atol=1e-5)


def test_a_mesh_gives_the_same(files, world):
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        spread = latents(files, world, mesh=mesh, batch_size=2)
    np.testing.assert_allclose(spread, latents(files, world), atol=1e-5)


def test_each_expert_serves_its_noise(tmp_path, folder, files, world):
    other = save(
        tmp_path / NAMES["dit"], arrays("dit", DIT, seed=9), config={"_class_name": "WanModel", "num_heads": 2}
    )
    both = dataclasses.replace(files, dit=(files.dit[0], open_checkpoint(other)))
    second = dataclasses.replace(files, dit=(both.dit[1],))
    x = np.asarray(draw_noise(0, [0], (*SHAPE, 16)))
    text = world.encode_text(PROMPTS[:1])

    def v(files, t, **kwargs):
        return np.asarray(experts(files, **kwargs).velocity(text, None, None)(x, jnp.full(1, t)))

    for keep_all in (True, False):
        np.testing.assert_array_equal(v(both, 0.9, keep_all=keep_all), v(files, 0.9))
        np.testing.assert_array_equal(v(both, 0.89, keep_all=keep_all), v(second, 0.89))
    assert np.abs(v(files, 0.89) - v(second, 0.89)).max() > 1e-2
    one, two = experts(both), experts(both, keep_all=True)
    for e in (one, two):
        e.params(0.99), e.params(0.5)
    assert (len(one._loaded), len(two._loaded)) == (1, 2)


def test_frames_are_the_autoencoders(files, world):
    z = np.asarray(draw_noise(1, [0, 1], (*SHAPE, 16)))
    params = load_params(files.vae, dtype="float32")
    video = np.asarray(VAE(files.vae.config).decode(params, z))
    np.testing.assert_allclose(world.decode(z), video, atol=1e-5)
    assert video.shape == (2, 5, 32, 32, 3)
    frames = world.decode_uint8(z[1])
    assert frames.dtype == np.uint8
    assert np.abs(frames / 127.5 - 1 - video[1].clip(-1, 1)).max() < 1 / 127
    tiled = WanWorld(files, tiled=True).decode_uint8(z[1])  # a single tile at this size
    np.testing.assert_array_equal(tiled, frames)
    world.release()


# --- memory ---------------------------------------------------------------------------------------------------------


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
        ({"size": (1280, 720)}, 14, ["--vae_tiling", "--resolution 480p"]),
        ({}, 5, ["--vae_tiling"]),
        ({"size": (1280, 720), "tiled": True, "num_frames": 401}, 14, ["--num_frames ", "--sequence 4"]),
        ({"dtype": "float32", "tiled": True}, 8, ["--dtype bfloat16"]),
        ({}, 0.1, ["nothing of this network"]),
    ],
)
def test_what_does_not_fit_says_what_would(files, changes, limit, fitting):
    job = published(files, **changes)
    with pytest.raises(ValueError, match="takes about the network") as error:
        check_memory(job, int(limit * GIB))
    for words in fitting:
        assert words in str(error.value)


def test_what_is_said_to_fit_does(files):
    """The largest number of frames, and not one latent frame more."""
    job = published(files, size=(1280, 720), num_frames=401, tiled=True)
    limit = 14 * GIB
    with pytest.raises(ValueError, match="would fit") as error:
        check_memory(job, limit)
    frames = int(str(error.value).split("--num_frames ")[1].split(" ")[0].rstrip(";"))
    check_memory(dataclasses.replace(job, num_frames=frames), limit)
    with pytest.raises(ValueError, match="would fit"):
        check_memory(dataclasses.replace(job, num_frames=frames + 4), limit)


def test_the_estimate_is_near_the_compilers():
    """The autoencoder's features, at a frame of 128 x 128."""
    vae, latents = VAE(WAN_VAE), jax.ShapeDtypeStruct((1, 1, 16, 16, 16), jnp.float32)
    params = abstract_network(WAN_VAE)
    _, state = jax.eval_shape(vae.decode_chunk, params, latents)
    step = jax.jit(functools.partial(VAE.decode_chunk, vae)).lower(params, latents, state).compile()
    temporary = step.memory_analysis().temp_size_in_bytes
    features = 4 * 4 * 96 * 128 * 128
    assert temporary == pytest.approx(memory.PEAK_DECODE * features, rel=0.3)
