"""A run's previews: its weights where they lie, its prompts, its world."""

import dataclasses

import jax
import numpy as np
import pytest

from rcm_jax.data.config import DataConfig
from rcm_jax.parallel import SEQUENCE_AXIS, make_mesh, shard
from rcm_jax.pipelines import preview
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.pipelines.preview import open_previews
from rcm_jax.training.config import PreviewConfig
from rcm_jax.training.info import model_info
from tests.tiny import MODEL, perturbed_params, tiny_run
from tests.wan.tiny import DIT, write_wan

PROMPTS = ("a red circle moving left", "a blue square moving up")


@pytest.fixture
def sampled(monkeypatch):
    """Every video that is written, before the codec."""
    out = []
    whole = preview.side_by_side
    monkeypatch.setattr(preview, "side_by_side", lambda videos, **how: out.extend(videos) or whole(videos, **how))
    return out


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2)])
def test_weights_are_sampled_on_the_mesh_where_they_lie(tmp_path, sampled, axes):
    config = tiny_run(previews=PreviewConfig(prompts=PROMPTS, num_steps=2), tensorboard=True)
    params, info, mesh = perturbed_params(MODEL), model_info(config), make_mesh(*axes)
    previews = open_previews(config)
    with jax.set_mesh(mesh):
        previews(3, shard(params, mesh), info, tmp_path)
    alone = Pipeline.of(params, info)(PROMPTS, num_steps=2, indices=range(2), progress="")
    assert [video.prompt for video in sampled] == list(PROMPTS)
    for mine, other in zip(sampled, alone, strict=True):
        np.testing.assert_allclose(mine.frames.astype(int), other.frames, atol=1)
    assert (tmp_path / "samples" / "0000003.mp4").stat().st_size > 0
    assert b"GIF89a" in next((tmp_path / "tensorboard" / "previews").iterdir()).read_bytes()


def test_the_pipeline_is_told_its_mesh():
    params, info = perturbed_params(MODEL), model_info(tiny_run())
    mesh = make_mesh(2, 2, 2)
    opened = Pipeline.of(shard(params, mesh), info).opened
    assert opened.experts.mesh is mesh
    assert (opened.options.fsdp, opened.options.sequence) == (4, mesh.shape[SEQUENCE_AXIS])
    assert jax.tree.leaves(opened.experts.params())[0].sharding.mesh is mesh
    assert Pipeline.of(params, info).opened.experts.mesh.size == 1


def test_prompts_that_the_world_cannot_read_are_told_before_the_run():
    config = tiny_run(previews=PreviewConfig(prompts=("a purple circle",)))
    with pytest.raises(ValueError, match="purple"):
        open_previews(config)


def wan_run(folder, **changes):
    data = DataConfig(name="shards", batch_size=8, latent_shape=(2, 4, 6))
    model = dataclasses.replace(DIT, dtype="float32")
    return tiny_run(**{"model": model, "data": data, "teacher": str(folder), "sample_every": 1} | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"))


def test_a_run_of_wans_is_shown_in_wans_world(tmp_path, folder, sampled):
    """With files beside its teacher, at the size of its own latents."""
    config = wan_run(folder, previews=PreviewConfig(prompts=("a cat on a boat",), num_steps=1), mesh={"sequence": 2})
    mesh = make_mesh(2, 2, 2)
    previews, info = open_previews(config), model_info(config)
    assert info.world == "wan"
    with jax.set_mesh(mesh):
        previews(1, shard(perturbed_params(config.model), mesh), info, tmp_path)
    (video,) = sampled
    assert (video.frames.shape, video.fps, video.prompt) == ((5, 32, 48, 3), 16, "a cat on a boat")


def test_wan_files_that_are_not_there_are_named(folder):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_previews(wan_run(folder, previews=PreviewConfig(vae="nowhere/vae.pth")))
    image = dataclasses.replace(DIT, in_channels=36)
    with pytest.raises(ValueError, match="takes an image would need one: set sample_every=0"):
        open_previews(wan_run(folder, model=image))
