"""The streaming command: what its flags mean, what it writes, and what it says to bad input."""

import dataclasses
import re

import imageio.v3 as iio
import jax
import numpy as np
import pytest

from rcm_jax import sample_causal
from rcm_jax.media.pictures import write_png
from rcm_jax.media.video import GrowingVideo, write_video
from rcm_jax.model_file import ModelInfo, save_model
from rcm_jax.options import taken
from rcm_jax.pipelines.options import FileOptions, SamplingOptions
from rcm_jax.pipelines.pipeline import load
from rcm_jax.wan.networks import init_params
from rcm_jax.worlds.builtin import BUILTIN
from tests.media.videos import moving
from tests.test_entry_points import fails
from tests.tiny import MODEL
from tests.wan.tiny import I2V, write_tiny_vae, write_wan

STUDENT = ModelInfo(
    dataclasses.replace(MODEL, remat="none"), "student", "toy", (5, 6, 6), 1600.0, 3.0,
    causal={"pattern": "c1-2", "steps_per_chunk": [1]},
)  # fmt: skip
TEACHER = dataclasses.replace(STUDENT, kind="teacher")
BARE = dataclasses.replace(STUDENT, causal={}, sigma_max=80.0)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    params = init_params(STUDENT.model, jax.random.key(0))
    return save_model(tmp_path_factory.mktemp("model") / "student.safetensors", params, STUDENT)


@pytest.fixture
def shown(monkeypatch):
    """What the command appends to its video: a list that fills."""
    out, append = [], GrowingVideo.append

    def both(self, frames):
        out.append(frames)
        append(self, frames)

    monkeypatch.setattr(GrowingVideo, "append", both)
    return out


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ("", {}),
        ("--mid_t 15/16 0.5 --timestep_shift 5 --seed 3", {"mid_t": ["15/16", "0.5"], "shift": 5.0, "seed": 3}),
        ("--mid_t", {"mid_t": []}),
        ("--shift 4 --no-context_from_last_step", {"shift": 4.0, "context_from_last_step": False}),
        ("--context_from_last_step --steps_per_chunk 4 2", {"context_from_last_step": True, "steps_per_chunk": [4, 2]}),
        ("--mid_t_schedules 15/16;", {"mid_t_schedules": "15/16;"}),
    ],
)
def test_flags_are_the_options(flags, want):
    given = vars(sample_causal.parser().parse_args([*flags.split(), "--chunk_t", "3", "--size", "64x32"]))
    assert taken(given, FileOptions) == {"chunk_t": 3}
    assert taken(given, SamplingOptions) == want | {"size": "64x32"}


def test_it_streams_a_video_that_is_the_written_one(tmp_path, student, capsys):
    args = ["--dit_path", str(student), "--num_samples", "2", "--window", "2", "--num_frames", "9"]
    whole, grown = tmp_path / "whole.mp4", tmp_path / "grown.mp4"
    sample_causal.main([*args, "--save_path", str(whole)])
    assert capsys.readouterr().out.strip() == str(whole)
    sample_causal.main([*args, "--save_path", str(grown), "--stream", "--profile", "--num_runs", "2"])
    out = capsys.readouterr().out
    found = {name: float(value) for name, value in re.findall(r"^(\w[\w ]*?)  +([\d.]+)", out, re.MULTILINE)}
    assert found.keys() == {"first decoded frame", "a further chunk", "steady rate", "peak memory", "runs"}
    assert found["first decoded frame"] > found["a further chunk"] > 0  # the first run compiles
    assert found["steady rate"] > 0
    assert 0.1 < found["peak memory"] < 24
    assert found["runs"] == 2
    assert "(a first chunk of 1 latent frames)" in out
    assert "(2 latent frames)" in out
    assert "compilation (first run)" in out
    frames = iio.imread(whole, plugin="pyav")
    assert frames.shape == (9, 192, 2 * 192 + 8, 3)
    assert np.abs(frames.astype(int) - iio.imread(grown, plugin="pyav")).mean() < 8  # lossy, both


@pytest.mark.long
def test_devices_share_the_network(tmp_path, student, shown):
    args = ["--dit_path", str(student), "--save_path", str(tmp_path / "v.mp4"), "--stream"]
    sample_causal.main(args)
    alone = [shown.pop(0) for _ in range(3)]
    sample_causal.main([*args, "--fsdp", "2", "--sequence", "2"])
    for part, want in zip(shown, alone, strict=True):
        assert np.abs(part.astype(int) - want).max() <= 1  # of 255: rounding


@pytest.mark.slow
def test_it_starts_from_an_image(tmp_path, student):
    picture = write_png(tmp_path / "p.png", moving(size=48)[3])
    args = ["--dit_path", str(student), "--image_path", str(picture), "--save_path", str(tmp_path / "v.mp4")]
    sample_causal.main(args)
    frames = iio.imread(tmp_path / "v.mp4", plugin="pyav")
    assert len(frames) == 5
    first = iio.imread(picture)[::2, ::2].repeat(8, axis=0).repeat(8, axis=1)
    assert np.abs(frames[0].astype(int) - first).mean() < 30  # through the world's codec, which knows other pictures


def test_it_repaints_a_video_and_again(tmp_path, student, shown):
    video = write_video(tmp_path / "in.mp4", moving(frames=7, size=24), fps=8)
    path = tmp_path / "v.mp4"
    flags = ["--video_path", str(video), "--noise_scale", "0.6", "--noise_rule", "motion", "--window", "2", "--stream"]
    sample_causal.main(["--dit_path", str(student), *flags, "--save_path", str(path)])
    assert [len(part) for part in shown] == [1, 2, 2, 2]
    sample_causal.main(["--again", str(path), "--stream"])
    np.testing.assert_array_equal(np.concatenate(shown[:4]), np.concatenate(shown[4:]))
    shown.clear()
    sample_causal.main(["--again", str(path), "--stream", "--noise_scale", "0.9", "--num_frames", "3"])
    assert [len(part) for part in shown] == [1, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--chunk_t 3", "chunk pattern c1-3 does not fit 5 latent frames; these do: c1-1, c1-2, c1-4"),
        ("--num_frames 6", "chunk pattern c1-2 does not fit 6 latent frames; these do: c1-1, c1-5"),
        ("--chunk_t 0", "--chunk_t=0 must be at least 1"),
        ("--num_steps 5", "5 steps must be 1..4"),
        ("--num_steps 0", "0 steps must be 1..4"),
        ("--mid_t 5/8 5/6", "must fall from at most 1 to 0"),
        ("--mid_t 5/8 half", "--mid_t='5/8 half' must be numbers or fractions"),
        ("--mid_t 1/0", "--mid_t='1/0' must be numbers or fractions"),
        ("--steps_per_chunk 4 2 --mid_t_schedules 15/16,5/6,5/8", "1 schedules of middle times for 2 step counts"),
        ("--steps_per_chunk 2 --mid_t_schedules 5/6,5/8", "2 steps need 1 middle times, not 2"),
        ("--steps_per_chunk 1 1 1 1", "times for 4 chunks; the video has 3"),
        ("--mid_t_schedules 5/6", "--mid_t_schedules needs --steps_per_chunk"),
        ("--context_from_last_step --context_from_last_step_start_chunk 3", "=3 is beyond the last chunk, 2"),
        ("--context_from_last_step_start_chunk 1", "needs --context_from_last_step"),
        ("--window 1 --sink 2", "window=1 is smaller than sink=2"),
        ("--sigma_max 0", "--sigma_max=0.0 must be above 0"),
        ("--guidance_scale 3", "--guidance_scale is for an ODE; the network is sampled in few steps"),
        ("--prompt purple", "purple"),
        ("--prompts_file nowhere.txt", "--prompts_file=nowhere.txt is not there: name a file"),
        ("--prompts_file nowhere.txt --prompt red", "--prompt and --prompts_file both say what to show: give one"),
        ("--prompt red[1s]|blue[1s#]", "--prompt asks for a cut (#)"),
        ("--prompt red[1s]|blue", "--prompt: scene 2, 'blue', does not end in its length"),
        ("--prompt_blend 0", "--prompt_blend=0 must be at least 1"),
        ("--num_samples 0", "--num_samples=0 must be at least 1"),
        ("--num_frames 0", "--num_frames=0 must be at least 1"),
        ("--seed -1", "--seed=-1 must be at least 0"),
        ("--image_path nowhere.png", "there is no image at nowhere.png"),
        ("--image_path {picture} --first_chunk_t 3", "an image is a first chunk of 1 latent frame"),
        ("--video_path nowhere.mp4", "there is no video at --video_path=nowhere.mp4"),
        ("--video_path {video} --first_chunk_t 7", "v.mp4 has 6 frames at 8 a second; the first chunk takes 7"),
        ("--video_path {video} --num_frames 99", "v.mp4 has 6 frames at 8 a second, fewer than --num_frames=99"),
        (
            "--video_path {video} --image_path {picture}",
            "give --video_path=",
        ),
        ("--video_path {video} --noise_scale 2", "--noise_scale=2.0 must be above 0 and at most 1"),
        ("--noise_scale 0.5", "--noise_scale is for input video: give --video_path"),
        ("--model toy", "give --model or --dit_path, not both"),
        ("--size 32x32 --resolution 480p", "--resolution, --size does not apply"),
        ("--dtype float32 --num_heads 2 --vae_path v", "--vae_path, --dtype does not apply"),
        ("--decoder tiny", "--decoder does not apply"),
        ("--sequence 3", "--sequence=3 must divide the 2 heads; use one of [1, 2]"),
        ("--fsdp 3 --sequence 3", "must be at least 1 and at most the 8 devices"),
        ("--fsdp 0", "--fsdp=0 must be at least 1"),
    ],
)
def test_it_refuses_and_overwrites_nothing(tmp_path, student, flags, message):
    path = write_video(tmp_path / "v.mp4", moving(), fps=8)
    picture = write_png(tmp_path / "p.png", moving()[0])
    before = path.read_bytes()
    flags = flags.format(picture=picture, video=path).split()
    fails(sample_causal.main, ["--dit_path", str(student), "--save_path", str(path), "--stream", *flags], message)
    assert path.read_bytes() == before


def test_it_refuses_other_files(tmp_path, student, monkeypatch):
    params = init_params(STUDENT.model, jax.random.key(0))
    flags = ["--save_path", str(tmp_path / "v.mp4"), "--dit_path"]
    other = save_model(tmp_path / "o.safetensors", params, BARE)
    fails(
        sample_causal.main, [*flags, str(other)], "does not say its chunk pattern: give --first_chunk_t and --chunk_t"
    )
    teacher = save_model(tmp_path / "t.safetensors", params, TEACHER)
    for_students = "--steps_per_chunk is for few-step sampling"
    fails(sample_causal.main, [*flags, str(teacher), "--steps_per_chunk", "2"], for_students)
    fails(sample_causal.main, [*flags, str(student), "--save_path", "v.avi"], "v.avi must end in .mp4")
    assert not (tmp_path / "v.mp4").exists()
    monkeypatch.setitem(BUILTIN, "toy_causal", tmp_path / "toy_causal_student.safetensors")
    fails(sample_causal.main, ["--model", "toy"], "this copy of the package has no toy_causal_student.safetensors")


# --- Wan's networks, in miniature -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"))


def run_wan(folder, path, *flags):
    small = ["--size", "32x48", "--num_frames", "13", "--first_chunk_t", "1", "--chunk_t", "1", "--dtype", "float32"]
    flags = ["--dit_path", str(folder), *small, "--distilled", "--num_steps", "2", "--stream", *flags]
    sample_causal.main([*flags, "--save_path", str(path)])


def test_wans_seconds_are_those_of_its_frames(folder):
    pipe = load(folder, first_chunk_t=1, chunk_t=1, kind="student")
    asked = pipe.request(prompts_file=[(0, "a fox"), (0.31, "snow")], num_frames=13, size="32x48", num_samples=2)
    assert asked.changes.starts == (0, 2)  # latent frame 2 begins at frame 5, 0.3125 s
    assert asked.texts == [("a fox", "snow")] * 2
    scenes = pipe.request("a fox [.25s] | snow [.5s]", size="32x48")
    assert (scenes.changes.starts, scenes.num_frames, scenes.latent_shape[0]) == ((0, 1), 9, 3)


@pytest.mark.long
def test_wan_streams_through_its_autoencoder(tmp_path, folder, shown):
    path = tmp_path / "v.mp4"
    run_wan(folder, path, "--prompt", "a red fox", "--seed", "3")
    assert [len(part) for part in shown] == [1, 4, 4, 4]
    assert iio.imread(path, plugin="pyav").shape == (13, 48, 32, 3)
    assert iio.immeta(path, plugin="pyav")["fps"] == 16


def test_wan_streams_through_the_tiny_decoder(tmp_path, folder, shown):
    run_wan(folder, tmp_path / "v.mp4", "--decoder", "tiny", "--tiny_vae_path", str(write_tiny_vae(tmp_path)))
    assert [part.shape for part in shown] == [(1, 48, 32, 3), *[(4, 48, 32, 3)] * 3]


@pytest.mark.long
def test_the_decoder_may_round(tmp_path, folder, shown):
    run_wan(folder, tmp_path / "v.mp4")
    exact = np.concatenate([shown.pop(0) for _ in range(4)]).astype(int)
    run_wan(folder, tmp_path / "v.mp4", "--vae_dtype", "bfloat16")
    difference = np.abs(np.concatenate(shown) - exact)
    assert 0 < difference.mean() < 5  # of 255


@pytest.mark.long
def test_devices_share_wans_network_and_one_decodes(tmp_path, folder, shown):
    path = tmp_path / "v.mp4"
    run_wan(folder, path)
    alone = [shown.pop(0) for _ in range(4)]
    run_wan(folder, path, "--fsdp", "2", "--sequence", "2")
    for part, want in zip(shown, alone, strict=True):
        assert np.abs(part.astype(int) - want).max() <= 1  # of 255: rounding


def test_wan_starts_from_an_image(tmp_path, folder, shown):
    picture = write_png(tmp_path / "p.png", np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))
    run_wan(folder, tmp_path / "v.mp4", "--image_path", str(picture), "--adaptive_resolution")
    assert [part.shape for part in shown] == [(1, 32, 48, 3), *[(4, 32, 48, 3)] * 3]
    with pytest.raises(SystemExit, match="--first_chunk_t and --chunk_t"):
        sample_causal.main(["--dit_path", str(folder), "--save_path", str(tmp_path / "v.mp4")])
    with pytest.raises(SystemExit, match="give --image_path"):
        run_wan(folder, tmp_path / "v.mp4", "--adaptive_resolution")


def test_image_to_video_networks_are_not_causal(tmp_path):
    folder = write_wan(tmp_path / "i2v", I2V)
    with pytest.raises(SystemExit, match="takes an image in its channels"):
        run_wan(folder, tmp_path / "v.mp4")
