"""Wan2.2's TI2V-5B in miniature: from text, and from text with an image that the video begins with."""

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import rcm_jax
from rcm_jax import sample
from rcm_jax.convert import commands
from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.sizes import dit_config
from rcm_jax.media.images import open_image
from tests.convert.tiny import save
from tests.test_entry_points import fails
from tests.wan.tiny import DIT, NAMES, TI2V, VAE, VAE22, arrays, write_picture, write_wan

SIZE = {"size": "64x32", "num_frames": 9}
SMALL = ["--size", "64x32", "--num_frames", "9", "--num_steps", "2", "--prompt", "a red fox"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("ti2v"), TI2V)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return write_picture(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def pipe(folder):
    return rcm_jax.load(folder)


@pytest.fixture(scope="module")
def from_image(pipe, picture):
    seen = []
    asked = {**SIZE, "num_steps": 2, "image_path": picture, "num_samples": 2}
    pipe("a red fox", on_step=lambda latents, *_: seen.append(np.asarray(latents)), **asked)
    return pipe.latents("a red fox", **asked), seen


def test_what_it_is_made_for(folder, pipe):
    assert open_checkpoint(folder).config == TI2V
    assert str(pipe.opened.files.vae.path) == str(folder / "Wan2.2_VAE.pth")
    request = pipe.request("a red fox")
    assert (request.size, request.num_frames, request.latent_shape, pipe.world.fps) == (
        (1280, 704), 121, (31, 44, 80), 24,
    )  # fmt: skip
    assert pipe.info.latent_shape == (31, 44, 80)
    how = pipe.sampling()
    assert (how.num_steps, how.shift, how.guidance) == (50, 5.0, 5.0)
    sizes = [pipe.world.size(*asked, None, None) for asked in (("720p", "4:3"), ("480p", None), (None, "9:16"))]
    assert sizes == [(960, 704), (832, 480), (704, 1280)]
    assert pipe.world.size(None, None, "64x32", Image.new("RGB", (60, 90))) == (32, 64)


def test_inspecting_says_that_it_may_begin_with_an_image(folder, capsys):
    commands.main(["inspect", str(folder)])
    assert "from text, or with an image as its first latent frame" in capsys.readouterr().out


def test_the_image_is_the_first_latent_frame(pipe, picture, from_image):
    latents, seen = from_image
    assert latents.shape == (2, 3, 2, 4, 48)
    first = pipe.world.first_latent(open_image(picture), (64, 32))[0, 0]
    for some in (*latents, *(step[0] for step in seen)):  # and stays so on the way
        np.testing.assert_array_equal(some[0], first)
    assert np.abs(latents[0, 1:] - latents[1, 1:]).max() > 0.1  # the rest comes from each video's noise
    alone = pipe.latents("a red fox", **SIZE, num_steps=2)
    assert np.abs(alone[0, 1:] - latents[0, 1:]).max() > 1e-3
    assert np.abs(alone[0, 0] - latents[0, 0]).max() > 0.1


def test_an_image_of_other_proportions_is_cut(pipe, picture):
    """Above and below, where it is too high; what is cut off does not count, and nothing is stretched."""
    high = np.array(open_image(picture).resize((64, 64)))
    other = high.copy()
    other[:16], other[48:] = 0, 255
    latents = [pipe.world.first_latent(Image.fromarray(x), (64, 32)) for x in (high, other, high[16:48])]
    np.testing.assert_array_equal(latents[0], latents[1])
    np.testing.assert_array_equal(latents[0], latents[2])


@pytest.mark.long
def test_frames_chunk_by_chunk_are_the_whole_video(pipe, from_image):
    latents, _ = from_image
    (whole,) = [np.concatenate([part.frames for part in parts]) for parts in pipe.world.paint(latents[:1])]
    assert whole.shape == (9, 32, 64, 3)
    decode, state, parts = pipe.world.decoder(), None, []
    for chunk in np.split(latents[:1], 3, axis=1):
        painted, state = decode(chunk, state)
        parts.append(painted.frames[0])
    assert [len(part) for part in parts] == [1, 4, 4]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert pipe.preview(latents).shape == (2, 3, 2, 4, 3)


@pytest.mark.long
def test_prompt_and_image_to_mp4(tmp_path, folder, picture, capsys):
    path = tmp_path / "v.mp4"
    sample.main(["--dit_path", str(folder), *SMALL, "--image_path", str(picture), "--save_path", str(path)])
    assert "sampled as a teacher: SamplerConfig(name='unipc', num_steps=2" in capsys.readouterr().err
    assert iio.imread(path, plugin="pyav").shape == (9, 32, 64, 3)
    assert iio.immeta(path, plugin="pyav")["fps"] == 24


def test_converted_files_give_the_same(tmp_path, folder, pipe):
    commands.main([str(folder), str(tmp_path / "dit.safetensors")])
    commands.main([str(folder / NAMES["vae22"]), str(tmp_path / "vae.safetensors")])
    back = tmp_path / "vae.pth"
    commands.main(["export", str(tmp_path / "vae.safetensors"), str(back)])
    theirs = arrays("vae", VAE22, 1)
    for name, tensor in open_checkpoint(back).tensors.items():
        np.testing.assert_array_equal(tensor.read(), theirs.pop(name))
    assert not theirs
    other = rcm_jax.load(tmp_path / "dit.safetensors", text_encoder_path=str(folder))
    assert other.info.model.image_first
    assert str(other.opened.files.vae.path) == str(tmp_path / "vae.safetensors")
    np.testing.assert_array_equal(*(p.latents("a cat", **SIZE, num_steps=2) for p in (other, pipe)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "1280x720"], ["--size=1280x720 is not possible", "multiples of 32"]),
        (["--num_frames", "120"], ["--num_frames=120 must be 4k + 1: use 117 or 121"]),
        (["--decoder", "tiny"], ["--decoder=tiny is of latents of 16 channels", "has 48"]),
        (["--model_size", "14B"], ["is not of --model_size=14B", "dim=32 instead of 5120"]),
        (["--image_path", "none.png"], ["there is no image at none.png"]),
        (["--vae_path", "{old}"], ["has latents of 16 channels, the network 48"]),
        (["--vae_path", "{folder}/" + NAMES["dit"]], ["is a diffusion transformer, not a video autoencoder"]),
    ],
)
def test_refuses_before_anything_is_computed(tmp_path, folder, monkeypatch, flags, words):
    monkeypatch.setattr("rcm_jax.pipelines.bidirectional.sample_batches", lambda *_, **__: pytest.fail("computes"))
    old = save(tmp_path / "old.safetensors", arrays("vae", VAE))
    flags = [flag.format(old=old, folder=folder) for flag in flags]
    fails(sample.main, ["--dit_path", str(folder), "--save_path", str(tmp_path / "v.mp4"), *flags], *words)


def test_its_autoencoder_is_looked_for(tmp_path, folder):
    """Wan2.1's beside it would not do."""
    model = save(tmp_path / NAMES["dit"], arrays("dit", TI2V), config={"_class_name": "WanModel", "num_heads": 2})
    save(tmp_path / NAMES["vae"], arrays("vae", VAE))
    words = "no video autoencoder", "Wan2.2_VAE.pth or vae", "Wan2.2 is published with it as Wan2.2_VAE.pth"
    fails(sample.main, ["--dit_path", str(model), "--text_encoder_path", str(folder)], *words)


def test_the_published_size_is_known_by_name(folder, capsys):
    fails(commands.main, [str(folder), "x.safetensors", "--model", "ti2v-5B"], "not of the size of ti2v-5B", "3072")
    fails(commands.main, [str(folder / NAMES["vae22"]), "x.safetensors", "--model", "vae"], "z_dim=48 instead of 16")
    capsys.readouterr()
    commands.main([str(folder / NAMES["vae22"]), "x.safetensors", "--dry_run"])
    assert "video autoencoder, dim=4 z_dim=48" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "begins"), [("ti2v", True), ("t2v", False)])
def test_a_config_may_say_that_it_begins_with_an_image(kind, begins):
    shapes = {name: array.shape for name, array in arrays("dit", DIT).items()}
    config = {"_class_name": "WanModel", "num_heads": 2, "model_type": kind}
    assert dit_config(shapes, config, None).image_first == begins


@pytest.mark.long
@pytest.mark.parametrize("mesh", [{"fsdp": 2}, {"sequence": 2}], ids=str)
def test_on_two_devices(folder, picture, mesh):
    asked = SIZE | {"num_steps": 2, "image_path": picture, "num_samples": 2}
    one, two = (rcm_jax.load(folder, dtype="float32", **where).latents("a red fox", **asked) for where in ({}, mesh))
    np.testing.assert_allclose(two, one, atol=1e-4)
    np.testing.assert_array_equal(two[:, 0], one[:, 0])
