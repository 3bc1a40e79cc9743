"""Which network serves which noise, and what stays in memory."""

import jax
import numpy as np
import pytest

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.errors import ArgumentError
from rcm_jax.model_file import ModelInfo, save_model
from rcm_jax.parallel import make_mesh
from rcm_jax.pipelines.networks import Experts
from rcm_jax.pipelines.pipeline import load
from tests.tiny import perturbed_params
from tests.wan.tiny import DIT, NAMES, arrays, save, write_wan


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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of Wan's, and in it students for a side each."""
    folder = write_wan(tmp_path_factory.mktemp("wan"))
    sides = {"high": (0.8, 1.0), "low": (0.0, 0.8), "other": (0.0, 0.7), "teacher": (0.0, 0.8)}
    for seed, (name, side) in enumerate(sides.items()):
        info = ModelInfo(DIT, "teacher" if name == "teacher" else "student", "wan", (2, 4, 6), t_range=side)
        save_model(folder / f"{name}.safetensors", perturbed_params(DIT, seed), info)
    return {name: str(folder / f"{name}.safetensors") for name in sides} | {"published": str(folder / NAMES["dit"])}


def test_files_of_experts_say_where_they_change(files):
    def boundary(high, low, **options):
        return load(files[high], second_dit_path=files[low], **options).opened.experts.boundary

    assert boundary("high", "low") == 0.8
    assert boundary("high", "published") == 0.8
    assert boundary("published", "low") == 0.8
    assert boundary("high", "other", boundary=0.75) == 0.75
    assert boundary("published", "published") == 0.875  # Wan2.2's, without an image


@pytest.mark.parametrize(
    ("high", "low", "words"),
    [
        ("high", None, "dit_path=.*/high.safetensors was trained for times from 0.8 to 1: two experts are needed"),
        ("low", None, "noisier times first, the other second, as second_dit_path$"),
        ("low", "high", "dit_path=.*/low.safetensors was trained for times from 0 to 0.8: two experts are needed"),
        ("published", "high", "second_dit_path=.*/high.safetensors was trained .* first, the other second$"),
        ("high", "other", "were trained for times that end at 0.7 and 0.8: boundary chooses"),
        ("high", "teacher", "are a student and a teacher, which are sampled in other ways"),
    ],
)
def test_experts_that_do_not_go_together_are_refused(files, high, low, words):
    with pytest.raises(ArgumentError, match=words):
        load(files[high], **({} if low is None else {"second_dit_path": files[low]}))


def test_weights_that_are_there_stay():
    params = {"a": np.ones(3)}
    held = Experts.of(params, DIT, make_mesh(devices=jax.devices()[:1]))
    held.release()
    assert held.params(0.2) is params
