"""The tiny autoencoder's names, both ways."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.tiny_vae import from_wan, to_wan
from rcm_jax.wan.config import TAEW2_1
from rcm_jax.wan.tiny_vae import TinyVAE
from tests.convert.tiny import save
from tests.wan.test_tiny_vae import SMALL, params


@pytest.fixture(scope="module")
def theirs():
    return to_wan(params(), SMALL)


def test_round_trip_is_bit_exact(theirs):
    jax.tree.map(np.testing.assert_array_equal, from_wan(theirs, SMALL), params())


def test_their_names_and_layouts(theirs):
    shapes = {name: array.shape for name, array in theirs.items()}
    want = {
        "encoder.0.weight": (7, 3, 3, 3), "encoder.0.bias": (7,), "encoder.2.conv.weight": (7, 14, 1, 1),
        "encoder.3.weight": (7, 7, 3, 3), "encoder.6.conv.4.bias": (7,), "encoder.12.conv.weight": (7, 7, 1, 1),
        "encoder.17.weight": (3, 7, 3, 3), "decoder.1.weight": (8, 3, 3, 3), "decoder.3.conv.0.weight": (8, 16, 3, 3),
        "decoder.7.conv.weight": (8, 8, 1, 1), "decoder.13.conv.weight": (12, 6, 1, 1),
        "decoder.14.weight": (5, 6, 3, 3), "decoder.17.conv.2.weight": (5, 5, 3, 3), "decoder.22.bias": (3,),
    }  # fmt: skip
    assert {name: shapes.get(name) for name in want} == want
    assert not {"decoder.8.bias", "decoder.20.bias", "encoder.3.bias", "decoder.7.conv.bias"} & set(shapes)


def test_missing_unused_and_misshapen_names_are_listed(theirs, tmp_path):
    renamed = dict(theirs)
    renamed["decoder.23.bias"] = renamed.pop("decoder.22.bias")
    with pytest.raises(ValueError, match=r"missing \[decoder.22.bias\]; not used \[decoder.23.bias \(3,\)\]"):
        from_wan(renamed, SMALL)
    for name, wrong in (("decoder.9.conv.0.weight", (6, 6, 3, 3)), ("decoder.13.conv.weight", (9, 6, 1, 1))):
        path = save(tmp_path / "x.safetensors", theirs | {name: np.zeros(wrong, np.float32)})
        with pytest.raises(ValueError, match=rf"{name}.*{re.escape(str(wrong))}"):
            open_checkpoint(path).ours()
    path = save(tmp_path / "half.safetensors", {k: v for k, v in theirs.items() if k.startswith("decoder")})
    with pytest.raises(ValueError, match=r"encoder.0.weight, which its size is read from, is missing"):
        open_checkpoint(path)


def test_of_a_layer_that_makes_more_frames_the_last_are_taken(theirs, tmp_path):
    more = np.concatenate([np.ones((8, 8, 1, 1), np.float32), theirs["decoder.7.conv.weight"]])
    source = open_checkpoint(save(tmp_path / "x.safetensors", theirs | {"decoder.7.conv.weight": more}))
    np.testing.assert_array_equal(
        source.ours()["decoder/level_0_time/kernel"].read(), params()["decoder"]["level_0_time"]["kernel"]
    )
    fewer = dataclasses.replace(SMALL, decoder_time=(1, 1, 2))
    assert from_wan(theirs, fewer)["decoder"]["level_1_time"]["kernel"].shape == (6, 6)
    latents = np.zeros((1, 3, 1, 2, 3), np.float32)
    video = jax.eval_shape(TinyVAE(fewer).decode_chunk, from_wan(theirs, fewer), latents)[0]
    assert video.shape == (1, 5, 8, 16, 3)


def test_published_sizes_are_read_from_shapes(tmp_path):
    shapes = jax.eval_shape(TinyVAE(TAEW2_1).init, jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), np.float32), leaf.shape), shapes)
    arrays = to_wan(zeros, TAEW2_1)
    assert sum(array.size for array in arrays.values()) == 11_315_539
    assert arrays["decoder.19.conv.weight"].shape == (128, 64, 1, 1)
    path = save(tmp_path / "taew2_1.safetensors", arrays)
    assert "size of taew2.1" in str(open_checkpoint(path, model="taew2.1"))
