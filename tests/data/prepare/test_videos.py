"""A folder of videos becomes shards whose numbers are those of its frames, encoded."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from rcm_jax.data.null_text import open_null_text
from rcm_jax.data.prepare import __main__ as commands
from rcm_jax.data.prepare import videos
from rcm_jax.data.prepare.text import cut_to_length
from rcm_jax.data.shard_files import find_shards, open_shard
from rcm_jax.media.clips import read_clip
from rcm_jax.media.video import write_video
from rcm_jax.wan.vae import VAE
from rcm_jax.worlds.wan.files import open_encoders
from rcm_jax.worlds.wan.world import WanWorld
from tests.data.test_null_text import SHARDS
from tests.media.videos import moving
from tests.test_entry_points import fails
from tests.wan.tiny import DIT, I2V, write_wan

SIZE = ["--size", "32x32", "--num_frames", "5"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"), I2V)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three videos with captions: 16 and 24 frames a second, and wider than high."""
    out = tmp_path_factory.mktemp("videos")
    write_video(out / "a.mp4", moving(8), 16)
    write_video(out / "b" / "c.mp4", moving(12, 48), 24)
    write_video(out / "d.mp4", np.concatenate([moving(6), 255 - moving(6)], axis=2), 16)
    for name, words in (("a", "a red fox"), ("b/c", "two dogs run"), ("d", "it rains")):
        (out / f"{name}.txt").write_text(words)
    return out


def samples(out):
    return [shard.read(i) for shard in map(open_shard, find_shards(out)) for i in range(len(shard))]


def make(folder, out, wan, *flags):
    commands.main(["videos", str(folder), "--out", str(out), "--vae", str(wan), *SIZE, *flags])


@pytest.fixture(scope="module")
def made(folder, wan, tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "set"
    make(folder, out, wan, "--samples_per_shard", "2")
    return out


def test_numbers_are_those_of_the_frames_encoded(made, folder, wan):
    files = open_encoders(str(wan))
    world, params = WanWorld(files), None
    found = samples(made)
    assert [(one.key, one.prompt) for one in found] == [
        ("000000000", "a red fox"), ("000000001", "two dogs run"), ("000000002", "it rains")
    ]  # fmt: skip
    from rcm_jax.convert.load import load_params

    params = load_params(files.vae, dtype="float32")
    for one, name in zip(found, ("a.mp4", "b/c.mp4", "d.mp4"), strict=True):
        frames = read_clip(folder / name, size=(32, 32), num_frames=5, fps=16)
        latents = VAE(files.vae.config).encode(params, jnp.asarray(frames[None] / np.float32(127.5) - 1))[0]
        np.testing.assert_array_equal(one.latents, np.asarray(latents).astype(ml_dtypes.bfloat16))
        text = world.encode_text([one.prompt])[0]
        np.testing.assert_array_equal(one.text, cut_to_length(text))
        assert len(one.text) < 20
        assert (one.condition, one.image) == (None, None)
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["shapes"]["latents"] == [2, 4, 4, 16]
    assert set(manifest["dtype"].values()) == {"bfloat16"}
    assert manifest["settings"]["size"] == "32x32"
    assert (made / "sources.tsv").read_text() == "000000000\ta.mp4\n000000001\tb/c.mp4\n000000002\td.mp4\n"
    null = open_null_text(SHARDS.__class__(null_text=str(made / "negative.safetensors")), DIT)
    assert null[: len(cut_to_length(null))].any()


def test_image_to_video_sets_carry_the_first_frame(folder, wan, tmp_path, monkeypatch):
    """As sampling sees an image: one that is a frame of this size."""
    monkeypatch.setattr(videos, "features", lambda _, prompts: (np.ones((2, 24), np.float32) for _ in prompts))
    monkeypatch.setattr(videos, "keep_negative", lambda *_: None)
    make(folder, tmp_path / "set", wan, "--clip", str(wan))
    frame = read_clip(folder / "d.mp4", size=(32, 32), num_frames=5, fps=16)[0]
    world = WanWorld(open_encoders(str(wan), clip=str(wan)))
    condition, image = world.condition(Image.fromarray(frame), (32, 32), 5)
    found = samples(tmp_path / "set")[2]
    np.testing.assert_array_equal(found.condition, condition[0].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(found.image, image[0].astype(ml_dtypes.bfloat16))
    assert found.condition.shape == (2, 4, 4, 20)


@pytest.fixture
def bad(folder, tmp_path):
    """Videos, of which one alone can be used."""
    out = tmp_path / "bad"
    write_video(out / "good.mp4", moving(8), 16)
    write_video(out / "short.mp4", moving(3), 16)
    write_video(out / "silent.mp4", moving(8), 16)
    data = (out / "good.mp4").read_bytes()
    (out / "unknown.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))
    (out / "text.mp4").write_text("no video")
    for name in ("good", "short", "unknown", "text"):
        (out / f"{name}.txt").write_text("a red fox")
    return out


def test_what_cannot_be_used_is_listed_before_anything_is_encoded(bad, wan, tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "WanWorld", lambda *_, **__: pytest.fail("encodes"))
    fails(
        lambda argv: make(bad, tmp_path / "set", wan, *argv), [], "4 of 5 videos cannot be used (--skip_bad leaves ",
        "short.mp4: it has 3 frames at 16 a second, and 5 are asked for", "unknown.mp4: its codec cannot be read",
        "silent.mp4: no caption: there is no silent.txt or silent.json beside it", "text.mp4: it cannot be read",
    )  # fmt: skip
    assert not list((tmp_path / "set").glob("*"))


def test_what_cannot_be_used_is_left_out_on_request(bad, wan, tmp_path, capsys):
    make(bad, tmp_path / "set", wan, "--skip_bad")
    assert capsys.readouterr().out.strip().endswith("4 left out, named in manifest.json")
    assert [(one.key, one.prompt) for one in samples(tmp_path / "set")] == [("000000000", "a red fox")]
    left = json.loads((tmp_path / "set" / "manifest.json").read_text())["left_out"]
    assert sorted(left) == ["short.mp4", "silent.mp4", "text.mp4", "unknown.mp4"]


def test_what_shows_only_while_decoding(folder, wan, tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "encoded", lambda *_: pytest.fail("encodes"))
    monkeypatch.setattr(videos, "features", lambda _, prompts: iter(prompts))
    monkeypatch.setattr(videos, "keep_negative", lambda *_: None)
    names, numbers = ["a.mp4", "b/c.mp4"], [0, 1]
    options = videos.ClipOptions(size="32x32", num_frames=11)
    with pytest.raises(ValueError, match="a.mp4: it has 8 frames at 16 a second, and 11 are asked for"):
        list(videos._decoded(folder, names, numbers, options))
    options = videos.ClipOptions(size="32x32", num_frames=11, skip_bad=True)
    assert [left.name for left in videos._decoded(folder, names, numbers, options)] == names


def test_videos_with_cuts_are_left_out_where_no_run_is_long_enough(folder, wan, tmp_path):
    write_video(tmp_path / "v" / "x.mp4", np.concatenate([moving(3), 255 - moving(4), moving(3)]), 16)
    write_video(tmp_path / "v" / "y.mp4", np.concatenate([moving(3), 255 - moving(6), moving(3)]), 16)
    options = videos.ClipOptions(size="32x32", num_frames=5, scene_cuts="skip")
    left, clip = videos._decoded(tmp_path / "v", ["x.mp4", "y.mp4"], [0, 1], options)
    assert left == ("x.mp4", "its longest run without a cut has 4 frames of 5")
    assert np.abs(clip.astype(int) - (255 - moving(6)[:5])).mean() < 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "33x32"], "--size=33x32 is not possible: width and height must be multiples of 16"),
        (["--num_frames", "6"], "--num_frames=6 must be 4k + 1: use 5 or 9"),
        (["--resolution", "480p"], "give --size, or --resolution and --aspect_ratio"),
        (["--captions", "words.xls"], "--captions=words.xls must end in .csv, .tsv or .jsonl"),
        (["--captions", "none.csv"], "--captions=none.csv is not there"),
        (["--process", "1"], "--process=1 must be 0 to 0"),
        (["--fps", "0"], "--fps=0.0 must be above 0"),
        (["--vae", "nowhere"], "nowhere"),
    ],
)
def test_options_that_are_refused(folder, wan, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(videos, "WanWorld", lambda *_, **__: pytest.fail("encodes"))
    fails(lambda argv: make(folder, tmp_path / "set", wan, *argv), flags, words)
    assert not (tmp_path / "set").exists()
