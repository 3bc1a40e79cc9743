"""A run's previews: its weights where they lie, its prompts, its world."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from rcm_jax.data.config import DataConfig
from rcm_jax.parallel import SEQUENCE_AXIS, make_mesh, shard
from rcm_jax.pipelines import preview
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.pipelines.preview import open_previews
from rcm_jax.training.config import PreviewConfig
from rcm_jax.training.info import model_info
from rcm_jax.worlds.wan.world import WanWorld
from tests.tiny import MODEL, perturbed_params, tiny_run
from tests.wan.tiny import DIT, I2V, write_wan

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


@pytest.mark.long
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": dataclasses.replace(DIT, in_channels=36)},
            "an image need one: set previews.image, or sample_every=0",
        ),
        ({"previews": PreviewConfig(image="p.png")}, "previews.image='p.png' is for networks that take an image"),
        (
            {"method": {"t_range": (0.9, 1.0)}},
            "of an expert for the times from 0.9 to 1 would need the other: set sample",
        ),
    ],
)
def test_what_cannot_be_shown_is_told_before_anything_is_opened(changes, words):
    with pytest.raises(ValueError, match=words):
        open_previews(wan_run("nowhere", **changes))


def test_a_picture_that_is_none_is_told_before_the_run(tmp_path, pictures):
    for file, error in (("none.png", FileNotFoundError), ("text.png", ValueError)):
        (tmp_path / "text.png").write_text("no picture")
        with pytest.raises(error, match=file):
            open_previews(image_run(pictures, str(tmp_path / file)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of an image-to-video network, and two pictures in it."""
    folder = write_wan(tmp_path_factory.mktemp("i2v"), I2V)
    for name in ("red", "blue"):
        Image.new("RGB", (90, 60), name).save(folder / f"{name}.png")
    return folder


def image_run(folder, image):
    previews = PreviewConfig(prompts=("a cat on a boat",), num_steps=1, image=image)
    return wan_run(folder, model=dataclasses.replace(I2V, dtype="float32"), previews=previews)


@pytest.mark.slow
def test_a_run_from_images_is_shown_from_its_picture(tmp_path, pictures, sampled, monkeypatch):
    """Its encoders are asked before the run, and not again."""
    for name in ("red", "blue"):
        config = image_run(pictures, str(pictures / f"{name}.png"))
        previews = open_previews(config)
        with monkeypatch.context() as during:
            during.setattr(WanWorld, "_condition", lambda *_: pytest.fail("the picture is encoded again"))
            previews(1, perturbed_params(config.model), model_info(config), tmp_path)
    red, blue = sampled
    assert red.frames.shape == (5, 32, 48, 3)
    assert np.abs(red.frames.astype(int) - blue.frames).max() > 3
