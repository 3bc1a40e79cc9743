"""Latents through the autoencoder and back before they are used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.load import load_params
from rcm_jax.data.config import DataConfig
from rcm_jax.data.reencoding import open_reencoding
from rcm_jax.data.sample import Sample
from rcm_jax.data.shard_files import write_shard
from rcm_jax.data.source import batches, make_source
from rcm_jax.wan.vae import VAE
from tests.convert.tiny import save
from tests.wan.tiny import DIT, arrays
from tests.wan.tiny import VAE as SMALL

GRID = (1, 2, 2)  # one frame: the others are another program to compile


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "Wan2.1_VAE.pth"
    save(path, arrays("vae", SMALL))
    return str(path)


@pytest.mark.long
def test_latents_are_decoded_and_encoded(tmp_path, file):
    rng = np.random.default_rng(0)
    samples = [
        Sample(str(i), rng.normal(size=(*GRID, 16)).astype("bfloat16"), rng.normal(size=(2, 24)).astype("bfloat16"))
        for i in range(3)
    ]
    write_shard(tmp_path / "shard-0.tar", samples)
    np.save(tmp_path / "null.npy", np.ones((2, 24)))
    config = DataConfig(
        "shards", str(tmp_path), str(tmp_path / "null.npy"), 3, GRID, shuffle=False, reencode=True, threads=2
    )
    source = make_source(config, 0, DIT, vae=file)
    (batch,) = batches(source, 0, 1, range(3))
    plain = make_source(dataclasses.replace(config, reencode=False), 0, DIT).batch(0)
    assert (batch.latents.dtype, plain.latents.dtype) == (np.float32, np.dtype("bfloat16"))
    np.testing.assert_array_equal(batch.text, plain.text, strict=True)
    vae = VAE(dataclasses.replace(SMALL, dtype="bfloat16"))
    params = load_params(open_checkpoint(file), dtype="bfloat16")
    for got, given in zip(batch.latents, plain.latents, strict=True):
        frames = vae.decode(params, jnp.asarray(given, jnp.float32)[None])
        assert jnp.abs(frames).max() > 1  # so that clipping matters
        np.testing.assert_array_equal(got, jax.device_get(vae.encode(params, frames.clip(-1, 1))[0]), strict=True)


def test_an_autoencoder_that_is_none(tmp_path, file):
    with pytest.raises(ValueError, match=r"data.reencode=True needs the autoencoder's file: name it as previews.vae"):
        open_reencoding("", 16)
    with pytest.raises(FileNotFoundError, match=r"previews.vae: there is no file at .*absent"):
        open_reencoding(str(tmp_path / "absent"), 16)
    with pytest.raises(ValueError, match=r"is a .* of 16 channels; the latents have 12 channels"):
        open_reencoding(file, 12)
