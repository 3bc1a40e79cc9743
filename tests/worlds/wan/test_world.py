"""Wan's world: text layer by layer, frames in parts and chunk by chunk, sizes; and its two experts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.load import load_params
from rcm_jax.kernels.target import Target
from rcm_jax.media.pictures import to_uint8 as levels
from rcm_jax.sampling.noise import draw_noise
from rcm_jax.wan.tiny_vae import TinyVAE
from rcm_jax.wan.umt5 import UMT5
from rcm_jax.wan.vae import VAE
from rcm_jax.worlds.painted import checked
from rcm_jax.worlds.wan.files import open_files
from rcm_jax.worlds.wan.world import WanWorld
from tests.wan.tiny import DIT, write_tiny_vae, write_wan

SHAPE = (2, 4, 4)
PROMPTS = ["a red fox", "two dogs run", "it rains in the snow", "a cat", "a boat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def files(folder):
    return open_files([open_checkpoint(folder)])


@pytest.fixture(scope="module")
def world(files):
    return WanWorld(files, dtype="float32")


def test_prompts_layer_by_layer_are_the_whole_encoders(files, world):
    ids, masks = files.tokenizer(PROMPTS)
    params = load_params(files.text, dtype="float32")
    whole = UMT5(dataclasses.replace(files.text.config, dtype="float32")).apply({"params": params}, ids, masks)
    mine = world.encode_text(PROMPTS)
    assert mine.shape == (5, 512, 24)
    np.testing.assert_allclose(mine, whole, atol=2e-5)
    np.testing.assert_array_equal(world.encode_text(PROMPTS[2:3])[0], mine[2])
    other = WanWorld(files, dtype="float32").encode_text(["it rains", PROMPTS[0]])  # in another order, not remembered
    np.testing.assert_array_equal(other[1], mine[0])


def test_frames_are_encoded_chunk_by_chunk_as_the_whole_video(world):
    video = np.random.default_rng(0).uniform(-1, 1, (9, 32, 32, 3)).astype(np.float32)
    encode, state, parts = world.encoder(), None, []
    for start, end in ((0, 5), (5, 9)):
        latents, state = encode(video[None, start:end], state)
        parts.append(latents[0])
    assert [len(part) for part in parts] == [2, 1]
    np.testing.assert_allclose(np.concatenate(parts), world.encode(video), atol=1e-5)  # normalised, as that is


def test_only_the_last_prompts_are_remembered(files, monkeypatch):
    asked = []

    def encode(_, ids, masks, *, dtype):
        asked.append(len(ids))
        return ids[:, :, None].astype(np.float32)

    monkeypatch.setattr("rcm_jax.worlds.wan.world.encode_prompts", encode)
    monkeypatch.setattr("rcm_jax.worlds.wan.world.REMEMBERED", 2)
    world = WanWorld(files)
    ids = files.tokenizer(PROMPTS)[0]
    np.testing.assert_array_equal(world.encode_text(PROMPTS)[..., 0], ids)
    np.testing.assert_array_equal(world.encode_text(PROMPTS[3:])[..., 0], ids[3:])
    np.testing.assert_array_equal(world.encode_text(PROMPTS[2:])[..., 0], ids[2:])
    assert asked == [5, 1]


def painted(world, z):
    return np.stack([np.concatenate([part.frames for part in parts]) for parts in world.paint(z)])


def streamed(world, z):
    """A file's frames of `decoder`, a latent frame at a time."""
    decode, state, parts = world.decoder(), None, []
    for chunk in np.split(z, z.shape[1], axis=1):
        part, state = decode(jnp.asarray(chunk), state)
        parts.append(checked(part, "frames"))
    return np.concatenate(parts, axis=1)


@pytest.mark.long
def test_frames_are_the_autoencoders(files, world):
    world.release()  # what other tests have read
    z = np.asarray(draw_noise(1, [0, 1], (*SHAPE, 16)))
    params = load_params(files.vae, dtype="float32")
    video = np.asarray(VAE(files.vae.config).decode(params, z))
    assert video.shape == (2, 5, 32, 32, 3)
    parts = [list(parts) for parts in world.decode(z)]
    assert [part.shape for part in parts[0]] == [(1, 32, 32, 3), (4, 32, 32, 3)]
    whole = np.stack([np.concatenate(video) for video in parts])
    np.testing.assert_allclose(whole, video, atol=1e-5)
    (tiled,) = WanWorld(files, tiled=True).decode(z[1:])  # a single tile at this size
    np.testing.assert_array_equal(np.concatenate(list(tiled)), whole[1])
    np.testing.assert_array_equal(
        [np.concatenate([p.frames for p in parts]) for parts in world.paint(z)], levels(whole)
    )
    (tiled,) = WanWorld(files, tiled=True).paint(z[1:])
    np.testing.assert_array_equal(next(tiled).frames, levels(whole[1]))
    np.testing.assert_array_equal(streamed(world, z), levels(whole))
    assert world._vae_params.keys() == {"decoder"}  # the encoder is not read for them
    world.release()
    assert not world._vae_params


@pytest.mark.slow
def test_frames_of_the_tiny_decoder(folder, tmp_path):
    """Whole, streamed, and a chunk at a time; in [-1, 1]; and the full one is not read for them."""
    files = open_files([open_checkpoint(folder)], tiny=str(write_tiny_vae(tmp_path)), decoder="tiny")
    world, z = WanWorld(files, dtype="float32"), np.asarray(draw_noise(1, [0, 1], (*SHAPE, 16)))
    video = np.asarray(TinyVAE(files.tiny.config).decode(load_params(files.tiny, dtype="float32"), z))
    assert video.shape == (2, 5, 32, 32, 3)
    assert np.abs(video).max() <= 1
    parts = [list(parts) for parts in world.decode(z)]
    assert [part.shape for part in parts[0]] == [(1, 32, 32, 3), (4, 32, 32, 3)]
    np.testing.assert_allclose(np.stack([np.concatenate(one) for one in parts]), video, atol=1e-5)
    np.testing.assert_array_equal(
        [np.concatenate([p.frames for p in parts]) for parts in world.paint(z)], levels(video)
    )
    np.testing.assert_array_equal(streamed(world, z), levels(video))
    assert not world._vae_params
    assert world._tiny_params is not None
    world.release()
    assert world._tiny_params is None


def test_sizes(world):
    assert world.size(None, None, None, None) == (832, 480)
    assert world.size("720p", "1:1", None, None) == (960, 960)
    assert world.size(None, None, "32x48", Image.new("RGB", (90, 60))) == (48, 32)
    assert world.latent_shape((832, 480), 77, DIT) == (20, 60, 104)
    assert world.num_frames(21) == 81


def test_dtypes(files, monkeypatch):
    """Unless it is told, the autoencoder encodes in float32, and decodes in what suits the device."""
    for gpu, wanted in ((True, "bfloat16"), (False, "float32")):
        place = Target("a device", 9.0 if gpu else None)
        monkeypatch.setattr("rcm_jax.worlds.wan.world.target", lambda place=place: place)
        world, told = WanWorld(files), WanWorld(files, vae_dtype="float32")
        assert (world.vae.config.dtype, world.painter.config.dtype) == ("float32", wanted)
        kernel = world._paints()["decoder"]["conv_in"]["conv"]["kernel"]
        assert kernel.dtype == wanted
        assert world._paints()["decoder"]["norm_out"]["scale"].dtype == "float32"
        assert world._autoencoder()["encoder"]["conv_in"]["conv"]["kernel"].dtype == "float32"
        assert world._paints()["decoder"]["conv_in"]["conv"]["kernel"] is kernel  # read once
        assert told.painter.config.dtype == "float32"
