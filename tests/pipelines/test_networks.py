"""Which network serves which noise, and what stays in memory."""

import jax
import numpy as np
import pytest

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.parallel import make_mesh
from rcm_jax.pipelines.networks import Experts
from tests.wan.tiny import DIT, arrays, save


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    config = {"_class_name": "WanModel", "num_heads": 2}
    return [
        open_checkpoint(save(folder / str(seed) / "dit.safetensors", arrays("dit", DIT, seed=seed), config=config))
        for seed in (0, 9)
    ]


def experts(sources, keep_all=False):
    mesh = make_mesh(devices=jax.devices()[:1])
    made = Experts(sources, DIT, mesh, dtype="float32", boundary=0.9)
    made.keep_all = keep_all
    return made


def first_weight(params):
    return np.asarray(params["patch_embedding"]["kernel"])


@pytest.mark.parametrize("keep_all", [True, False])
def test_each_expert_serves_its_noise(sources, keep_all):
    both = experts(sources, keep_all)
    high, low = (first_weight(experts([source]).params()) for source in sources)
    assert np.abs(high - low).max() > 1e-2
    for t, want in ((1.0, high), (np.float32(0.9), high), (0.89, low), (0.95, high)):
        np.testing.assert_array_equal(first_weight(both.params(t)), want)
    assert len(both._loaded) == 1 + keep_all
    both.release()
    assert not both._loaded


def test_weights_that_are_there_stay():
    params = {"a": np.ones(3)}
    held = Experts.of(params, DIT, make_mesh(devices=jax.devices()[:1]))
    held.release()
    assert held.params(0.2) is params
