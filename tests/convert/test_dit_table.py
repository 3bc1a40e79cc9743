"""The table of Wan2.1's names is strict in both directions."""

import jax
import numpy as np
import pytest

from rcm_jax.convert.dit import from_wan, to_wan
from rcm_jax.wan.networks import init_params
from tests.wan.test_dit import I2V, SMALL


@pytest.fixture(scope="module")
def weights():
    params = jax.tree.map(np.asarray, init_params(SMALL, jax.random.key(0)))
    return to_wan(params, SMALL), params


def test_round_trip_is_bit_exact(weights):
    theirs, params = weights
    assert theirs["patch_embedding.weight"].shape == (48, 4, 1, 2, 2)
    assert theirs["blocks.2.modulation"].shape == (1, 6, 48)
    assert theirs["blocks.0.ffn.0.weight"].shape == (64, 48)
    jax.tree.map(np.testing.assert_array_equal, from_wan(theirs, SMALL), params)


def test_round_trip_with_image_rows():
    params = jax.tree.map(np.asarray, init_params(I2V, jax.random.key(0)))
    theirs = to_wan(params, I2V)
    assert theirs["img_emb.proj.3.weight"].shape == (48, 20)
    assert theirs["blocks.1.cross_attn.k_img.weight"].shape == (48, 48)
    jax.tree.map(np.testing.assert_array_equal, from_wan(theirs, I2V), params)
    with pytest.raises(ValueError, match=r"not used .*img_emb"):
        from_wan(theirs, SMALL)


def test_linear_patch_embedding_of_the_rcm_files(weights):
    theirs, params = weights
    linear = theirs | {"patch_embedding.weight": theirs["patch_embedding.weight"].reshape(48, -1)}
    jax.tree.map(np.testing.assert_array_equal, from_wan(linear, SMALL), params)


def test_missing_and_unused_names_are_listed(weights):
    theirs, _ = weights
    broken = {k: v for k, v in theirs.items() if k != "blocks.1.self_attn.q.bias"} | {"extra.weight": np.zeros(1)}
    with pytest.raises(ValueError, match=r"missing \[blocks.1.self_attn.q.bias\]; not used \[extra.weight \(1,\)\]"):
        from_wan(broken, SMALL)


def test_unknown_parameters_do_not_go_out(weights):
    _, params = weights
    with pytest.raises(ValueError, match="not used"):
        to_wan(params | {"extra": {"kernel": np.zeros(1)}}, SMALL)
