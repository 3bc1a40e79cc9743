"""The autoencoder's names, both ways."""

import dataclasses

import jax
import numpy as np
import pytest

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.vae import from_wan, to_wan
from rcm_jax.wan.config import WAN22_VAE
from rcm_jax.wan.networks import abstract_network
from tests.convert.tiny import save
from tests.wan.test_vae import RESIDUAL, SMALL, params


@pytest.fixture(scope="module")
def weights():
    return to_wan(params(), SMALL), jax.tree.map(np.asarray, params())


def test_round_trip_is_bit_exact(weights):
    theirs, ours = weights
    jax.tree.map(np.testing.assert_array_equal, from_wan(theirs, SMALL), ours)


def test_their_names_and_layouts(weights):
    shapes = {name: array.shape for name, array in weights[0].items()}
    want = {
        "conv1.weight": (6, 6, 1, 1, 1),
        "conv2.weight": (3, 3, 1, 1, 1),
        "encoder.conv1.weight": (4, 3, 3, 3, 3),
        "encoder.downsamples.1.resample.1.weight": (4, 4, 3, 3),
        "encoder.downsamples.1.time_conv.weight": (4, 4, 3, 1, 1),
        "encoder.downsamples.2.shortcut.weight": (8, 4, 1, 1, 1),
        "encoder.downsamples.4.residual.6.weight": (8, 8, 3, 3, 3),
        "encoder.head.2.weight": (6, 8, 3, 3, 3),
        "decoder.middle.1.norm.gamma": (8, 1, 1),
        "decoder.middle.1.to_qkv.weight": (24, 8, 1, 1),
        "decoder.upsamples.2.time_conv.weight": (16, 8, 3, 1, 1),
        "decoder.upsamples.2.resample.1.weight": (4, 8, 3, 3),
        "decoder.upsamples.3.shortcut.weight": (8, 4, 1, 1, 1),
        "decoder.upsamples.7.residual.0.gamma": (4, 1, 1, 1),
    }
    assert {name: shapes.get(name) for name in want} == want
    assert "decoder.upsamples.6.shortcut.weight" not in shapes


def test_wan22_s_names_are_by_level():
    theirs, ours = to_wan(params(RESIDUAL), RESIDUAL), jax.tree.map(np.asarray, params(RESIDUAL))
    jax.tree.map(np.testing.assert_array_equal, from_wan(theirs, RESIDUAL), ours)
    shapes = {name: array.shape for name, array in theirs.items()}
    want = {
        "encoder.conv1.weight": (4, 12, 3, 3, 3),
        "encoder.downsamples.0.downsamples.1.resample.1.weight": (4, 4, 3, 3),
        "encoder.downsamples.1.downsamples.0.shortcut.weight": (8, 4, 1, 1, 1),
        "encoder.downsamples.1.downsamples.1.time_conv.weight": (8, 8, 3, 1, 1),
        "encoder.downsamples.2.downsamples.0.residual.6.weight": (8, 8, 3, 3, 3),
        "decoder.upsamples.0.upsamples.2.time_conv.weight": (24, 12, 3, 1, 1),
        "decoder.upsamples.1.upsamples.2.resample.1.weight": (12, 12, 3, 3),
        "decoder.upsamples.2.upsamples.0.shortcut.weight": (6, 12, 1, 1, 1),
        "decoder.head.2.weight": (12, 6, 3, 3, 3),
    }
    assert {name: shapes.get(name) for name in want} == want
    assert "decoder.upsamples.1.upsamples.0.shortcut.weight" not in shapes


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_wan22_s_file_says_its_sizes(tmp_path, suffix):
    arrays = to_wan(params(RESIDUAL), RESIDUAL)
    found = open_checkpoint(save(tmp_path / f"x{suffix}", arrays)).config
    assert found == dataclasses.replace(RESIDUAL, mean=(0.0,) * 3, std=(1.0,) * 3)  # which no file of this kind says
    arrays["encoder.conv1.weight"] = arrays["encoder.conv1.weight"][:, :10]
    with pytest.raises(ValueError, match=r"encoder.conv1 takes 10 channels, no square of colours"):
        open_checkpoint(save(tmp_path / f"y{suffix}", arrays))


def test_wan22_s_latents_are_normalised_as_published(tmp_path):
    config = dataclasses.replace(RESIDUAL, z_dim=48, mean=WAN22_VAE.mean, std=WAN22_VAE.std)
    shapes = abstract_network(config)
    arrays = to_wan(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes), config)
    assert open_checkpoint(save(tmp_path / "x.safetensors", arrays)).config == config


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 3, 1, 1)])
def test_a_kernel_of_another_size_is_named(weights, shape):
    with pytest.raises(ValueError, match=r"conv1.weight has shape \(6, 6.*, which its place does not take: .+"):
        from_wan(weights[0] | {"conv1.weight": np.zeros(shape)}, SMALL)


def test_missing_and_unused_names_are_listed(weights):
    theirs = dict(weights[0])
    theirs["decoder.extra"] = theirs.pop("conv1.bias")
    with pytest.raises(ValueError, match=r"missing \[conv1.bias\]; not used \[decoder.extra \(6,\)\]"):
        from_wan(theirs, SMALL)
