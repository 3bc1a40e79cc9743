"""The names of text encoder and CLIP, both ways."""

import jax
import numpy as np
import pytest

from rcm_jax.convert import clip, umt5
from tests.wan import test_clip, test_umt5

CASES = {"umt5": (umt5, test_umt5), "clip": (clip, test_clip)}


@pytest.fixture(params=CASES)
def case(request):
    table, network = CASES[request.param]
    return table, network.SMALL, network.params(), table.to_wan(network.params(), network.SMALL)


def test_round_trip_is_bit_exact(case):
    table, config, params, theirs = case
    jax.tree.map(np.testing.assert_array_equal, table.from_wan(theirs, config), jax.tree.map(np.asarray, params))


def test_missing_and_unused_names_are_listed(case):
    table, config, _, theirs = case
    name = sorted(theirs)[0]
    broken = {k: v for k, v in theirs.items() if k != name} | {"extra.weight": np.zeros(1)}
    with pytest.raises(ValueError, match=rf"missing \[{name}\]; not used \[extra.weight \(1,\)\]"):
        table.from_wan(broken, config)


def test_their_names_and_layouts():
    theirs = {k: v.shape for k, v in umt5.to_wan(test_umt5.params(), test_umt5.SMALL).items()}
    assert theirs["blocks.2.attn.o.weight"] == (24, 16)
    assert theirs["blocks.0.ffn.gate.0.weight"] == (32, 24)
    assert theirs["blocks.1.pos_embedding.embedding.weight"] == (32, 2)
    theirs = {k: v.shape for k, v in clip.to_wan(test_clip.params(), test_clip.SMALL).items()}
    assert theirs["visual.cls_embedding"] == (1, 1, 16)
    assert theirs["visual.pos_embedding"] == (1, 10, 16)
    assert theirs["visual.patch_embedding.weight"] == (16, 3, 4, 4)
    assert theirs["visual.transformer.1.attn.to_qkv.weight"] == (48, 16)


def test_what_wan_does_not_use_of_clip_is_dropped_and_nothing_else():
    config, params = test_clip.SMALL, test_clip.params()
    theirs = clip.to_wan(params, config)
    besides = ("visual.transformer.2.mlp.0.weight", "visual.post_norm.bias", "visual.head", "log_scale", "textual.a.b")
    whole = theirs | {name: np.zeros(1) for name in besides}
    jax.tree.map(np.testing.assert_array_equal, clip.from_wan(whole, config), jax.tree.map(np.asarray, params))
    with pytest.raises(ValueError, match=r"not used \[visual.transformer.3.mlp.0.weight \(1,\)\]"):
        clip.from_wan(theirs | {"visual.transformer.3.mlp.0.weight": np.zeros(1)}, config)
