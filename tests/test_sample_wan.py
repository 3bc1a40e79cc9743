"""The command with Wan's files, in miniature: prompt to MP4, and one message for what cannot be done."""

import shutil

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import rcm_jax
from rcm_jax import evaluate, sample
from rcm_jax.convert import commands
from rcm_jax.media.video import write_video
from rcm_jax.worlds.wan.world import WanWorld
from tests.convert.tiny import save
from tests.media.videos import moving
from tests.test_entry_points import fails, student  # noqa: F401
from tests.wan.tiny import DIT, I2V, NAMES, arrays, write_picture, write_tiny_vae, write_wan

SMALL = ["--size", "32x48", "--num_frames", "5"]
STUDENT = ["--kind", "student", "--num_steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("i2v"), I2V)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return write_picture(tmp_path_factory.mktemp("image"))


@pytest.fixture
def videos(monkeypatch):
    """What the command writes, before the codec: a list that fills."""
    out = []

    def write(path, frames, *rest):
        out.append(np.array(frames))
        return write_video(path, frames, *rest)

    monkeypatch.setattr("rcm_jax.pipelines.video.write_video", write)
    return out


@pytest.fixture
def nothing_computes(monkeypatch):
    monkeypatch.setattr("rcm_jax.pipelines.bidirectional.sample_batches", lambda *_, **__: pytest.fail("computes"))


def run(folder, path, *flags):
    sample.main(["--dit_path", str(folder), *SMALL, "--save_path", str(path), *flags])


@pytest.mark.long
def test_prompt_to_mp4(tmp_path, folder, videos, capsys):
    path = tmp_path / "new" / "v.mp4"
    run(folder, path, *STUDENT, "--prompt", "a red fox", "--num_samples", "2")
    said = capsys.readouterr()
    assert said.out.strip() == str(path)
    assert "sampled as a student" in said.err
    assert iio.imread(path, plugin="pyav").shape == (5, 48, 64, 3)
    assert iio.immeta(path, plugin="pyav")["fps"] == 16
    both = videos[0]
    assert np.abs(both[:, :, :32].astype(int) - both[:, :, 32:]).max() > 10
    run(folder, path, *STUDENT, "--prompt", "a red fox")  # one of them alone is the same
    np.testing.assert_array_equal(videos[1], both[:, :, :32])
    run(folder, path, *STUDENT, "--prompt", "a red fox", "--seed", "1")
    assert np.abs(videos[2].astype(int) - videos[1]).max() > 10


def test_scores_are_of_the_built_in_world(folder):
    fails(evaluate.main, ["--student", f"a={folder}"], f"{folder} is of the world 'wan'")


def test_a_file_of_prompts(tmp_path, folder, videos):
    (tmp_path / "prompts.txt").write_text("a cat on a boat\n\na red fox\n")
    run(folder, tmp_path / "v.mp4", *STUDENT, "--prompts_file", str(tmp_path / "prompts.txt"), "--batch_size", "2")
    assert sorted(p.name for p in tmp_path.glob("*.mp4")) == ["v_000.mp4", "v_001.mp4"]
    run(folder, tmp_path / "v.mp4", *STUDENT, "--prompt", "a red fox", "--batch_size", "2")
    np.testing.assert_array_equal(videos[2], videos[1])
    assert (videos[1] != videos[0]).any()


def test_a_teacher_is_guided(tmp_path, folder, videos):
    for flags in ([], ["--guidance_scale", "1"], ["--negative_prompt", "two dogs"], ["--sampler", "euler"]):
        run(folder, tmp_path / "v.mp4", "--num_steps", "3", "--prompt", "a red fox", *flags)
    for other in videos[1:]:
        assert np.abs(videos[0].astype(int) - other).max() > 3


@pytest.mark.long
def test_image_to_mp4(tmp_path, i2v, picture, videos):
    path, asked = tmp_path / "v.mp4", [*STUDENT, "--prompt", "a fox", "--adaptive_resolution"]
    run(i2v, path, *asked, "--image_path", str(picture))
    assert iio.imread(path, plugin="pyav").shape == (5, 32, 48, 3)
    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    run(i2v, path, *asked, "--image_path", str(tmp_path / "red.png"))
    assert np.abs(videos[1].astype(int) - videos[0]).max() > 3


def test_converted_files_give_the_same(tmp_path, folder, videos):
    shutil.copytree(folder / "google", tmp_path / "google")
    for name, out, flags in (
        ("dit", "dit.safetensors", ["--kind", "student"]), ("vae", "vae.safetensors", []),
        ("umt5", "umt5", ["--format", "orbax"]),
    ):  # fmt: skip
        commands.main([str(folder / NAMES[name]), str(tmp_path / out), *flags])
    run(folder, tmp_path / "v.mp4", *STUDENT, "--prompt", "a cat")
    dit, text = tmp_path / "dit.safetensors", ["--text_encoder_path", str(tmp_path / "umt5")]
    run(dit, tmp_path / "w.mp4", "--num_steps", "2", "--prompt", "a cat", *text)
    np.testing.assert_array_equal(videos[1], videos[0])


def test_the_tiny_decoder(tmp_path, folder, videos):
    """Named, or found beside the network; the same latents in other frames; --again knows of it."""
    asked, tiny = [*STUDENT, "--prompt", "a cat"], write_tiny_vae(tmp_path / "elsewhere")
    run(folder, tmp_path / "v.mp4", *asked)
    run(folder, tmp_path / "w.mp4", *asked, "--decoder", "tiny", "--tiny_vae_path", str(tiny))
    assert videos[1].shape == videos[0].shape
    assert np.abs(videos[1].astype(int) - videos[0]).max() > 10
    shutil.copytree(folder, tmp_path / "whole")
    converted = tmp_path / "whole" / "tiny_vae.safetensors"
    commands.main([str(tiny), str(converted), "--dtype", "keep"])
    run(tmp_path / "whole" / NAMES["dit"], tmp_path / "x.mp4", *asked, "--decoder", "tiny")
    np.testing.assert_array_equal(videos[2], videos[1])
    sample.main(["--again", str(tmp_path / "x.mp4")])
    sample.main(["--again", str(tmp_path / "w.mp4"), "--decoder", "full"])
    np.testing.assert_array_equal(videos[3], videos[1])
    np.testing.assert_array_equal(videos[4], videos[0])


def test_an_image_is_encoded_by_the_full_autoencoder(tmp_path, i2v, picture, videos):
    flags = [*STUDENT, "--prompt", "a fox", "--image_path", str(picture), "--adaptive_resolution"]
    run(i2v, tmp_path / "v.mp4", *flags, "--decoder", "tiny", "--tiny_vae_path", str(write_tiny_vae(tmp_path)))
    assert videos[0].shape == (5, 32, 48, 3)


def test_wan22_has_two_networks(tmp_path, folder, videos):
    second = save(
        tmp_path / NAMES["dit"], arrays("dit", DIT, seed=5), config={"_class_name": "WanModel", "num_heads": 2}
    )
    run(folder, tmp_path / "v.mp4", *STUDENT, "--prompt", "a cat")
    for boundary in ("0.0", "0.97"):
        flags = ["--second_dit_path", str(second), "--boundary", boundary]
        run(folder, tmp_path / "v.mp4", *STUDENT, "--prompt", "a cat", *flags)
    np.testing.assert_array_equal(videos[1], videos[0])
    assert np.abs(videos[2].astype(int) - videos[0]).max() > 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_steps", "5"], ["5", "1", "4"]),
        (["--guidance_scale", "3"], ["--guidance_scale does not apply", "--kind"]),
        (["--num_frames", "6"], ["--num_frames=6", "5 or 9"]),
        (["--size", "40x40"], ["40x40", "multiples of 16"]),
        (["--resolution", "480p"], ["--size, or --resolution and --aspect_ratio"]),
        (["--model_size", "1.3B"], ["not of --model_size=1.3B", "dim=32 instead of 1536"]),
        (["--image_path", "p.png"], ["no image at p.png"]),
        (["--adaptive_resolution"], ["--image_path"]),
        (["--scale", "2"], ["--scale does not apply"]),
        (["--fsdp", "16"], ["--fsdp=16", "8 devices"]),
        (["--sequence", "4"], ["--sequence=4", "2 heads"]),
        (["--vae_path", "{folder}/" + NAMES["umt5"]], ["umT5 text encoder, not a video autoencoder", "--vae_path="]),
        (["--text_encoder_path", "{folder}/" + NAMES["vae"]], ["autoencoder, not a umT5", "--text_encoder_path="]),
        (["--vae_path", "{folder}/none.pth"], ["none.pth"]),
        (["--decoder", "tiny"], ["no tiny video autoencoder", "--tiny_vae_path", "TAEHV publishes it as taew2_1.pth"]),
        (["--decoder", "tiny", "--tiny_vae_path", "none.pth"], ["none.pth"]),
        (
            ["--decoder", "tiny", "--tiny_vae_path", "{folder}/" + NAMES["vae"]],
            ["is a video autoencoder, not a tiny video autoencoder", "--tiny_vae_path="],
        ),
        (["--tiny_vae_path", "x.pth"], ["--tiny_vae_path=x.pth is the tiny decoder's: give --decoder tiny too"]),
        (["--decoder", "tiny", "--vae_tiling"], ["--vae_tiling is for the full decoder; --decoder=tiny needs no"]),
        (["--tokenizer_path", "{folder}"], ["tokenizer.json", "google/umt5-xxl", "--tokenizer_path"]),
        (["--prompts_file", "none.txt"], ["none.txt"]),
        (["--num_samples", "0"], ["--num_samples=0"]),
    ],
)
def test_refuses_and_overwrites_nothing(tmp_path, folder, nothing_computes, flags, words):
    path = write_video(tmp_path / "v.mp4", moving(), fps=8)
    before = path.read_bytes()
    flags = [flag.format(folder=folder) for flag in flags]
    fails(sample.main, ["--dit_path", str(folder), *SMALL, *STUDENT, "--save_path", str(path), *flags], *words)
    assert path.read_bytes() == before


def test_resolutions_not_in_the_table(folder):
    fails(sample.main, ["--dit_path", str(folder), "--resolution", "1080p"], "1080p", "832x480", "1280x720")
    fails(sample.main, ["--dit_path", str(folder), "--aspect_ratio", "2:1"], "2:1", "9:16 480x832")


def test_images_only_where_they_belong(tmp_path, folder, i2v, picture):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    where = [*SMALL, "--save_path", str(tmp_path / "v.mp4")]
    fails(sample.main, ["--dit_path", str(i2v), *where], "36 input channels", "--image_path")
    fails(sample.main, ["--dit_path", str(folder), "--image_path", str(picture), *where], "takes no image")
    fails(sample.main, ["--dit_path", str(i2v), "--image_path", str(text), *where], "text.png is not an image")


def test_damaged_and_dangerous_files(tmp_path, folder):
    where = [*SMALL, "--save_path", str(tmp_path / "v.mp4")]
    for name in ("dit", "vae"):
        cut = tmp_path / NAMES[name]
        cut.write_bytes((folder / NAMES[name]).read_bytes()[:-2000])
        flags = ["--dit_path", str(cut)] if name == "dit" else ["--dit_path", str(folder), "--vae_path", str(cut)]
        fails(sample.main, [*flags, *where], f"{cut} is not a whole")
    missing = arrays("dit", DIT)
    del missing["blocks.1.ffn.2.bias"]
    config = {"_class_name": "WanModel", "num_heads": 2}
    path = save(tmp_path / "missing.safetensors", missing, config=config)
    fails(sample.main, ["--dit_path", str(path), *where], "missing", "blocks.1.ffn.2.bias")
    assert not (tmp_path / "v.mp4").exists()


def test_files_are_looked_for_beside_the_network(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = tmp_path / "deep" / "alone" / NAMES["dit"]
    alone.parent.mkdir(parents=True)
    shutil.copy(folder / NAMES["dit"], alone)
    shutil.copy(folder / "config.json", alone.parent)
    fails(sample.main, ["--dit_path", str(alone), *SMALL], "no video autoencoder", str(alone.parent), "--vae_path")
    shutil.copytree(folder, tmp_path / "checkpoints")
    files = rcm_jax.load(alone).opened.files
    assert str(files.vae.path) == "checkpoints/" + NAMES["vae"]
    assert str(files.tokenizer.path) == "checkpoints/google/umt5-xxl/tokenizer.json"


def test_too_little_memory_is_known_before_anything_is_loaded(tmp_path, folder, monkeypatch, nothing_computes):
    monkeypatch.setattr("rcm_jax.pipelines.bidirectional.device_limit", lambda: 1 << 20)
    monkeypatch.setattr(WanWorld, "encode_text", lambda *_, **__: pytest.fail("computes"))
    where = ["--save_path", str(tmp_path / "v.mp4")]
    fails(sample.main, ["--dit_path", str(folder), *where], "832x480 with 77 frames takes about", "would fit")


def test_the_toy_world_has_no_such_flags(student):  # noqa: F811
    fails(sample.main, ["--dit_path", student, "--num_frames", "5"], "--num_frames=5 does not apply", "built-in world")
    fails(sample.main, ["--dit_path", student, "--vae_path", "x"], "--vae_path does not apply", "built-in world")
    fails(sample.main, ["--dit_path", student, "--decoder", "tiny"], "--decoder does not apply", "built-in world")
