"""The streaming command: what its flags mean, what it writes, and what it says to bad input."""

import dataclasses

import imageio.v3 as iio
import jax
import numpy as np
import pytest

from rcm_jax import sample_causal
from rcm_jax.sampling.rollout import few_step_schedule, ode_schedule
from rcm_jax.sampling.video import write_png, write_video
from rcm_jax.training.config import CausalConfig
from rcm_jax.training.model_file import BUILTIN, ModelInfo, save_model
from rcm_jax.training.state import init_params
from tests.sampling.test_video import moving
from tests.test_entry_points import fails
from tests.tiny import MODEL

pytestmark = pytest.mark.usefixtures("compile_fast")
FIRST, FOUR = 1600 / 1601, (15 / 16, 5 / 6, 5 / 8)
STUDENT = ModelInfo(
    dataclasses.replace(MODEL, remat=False), "student", "toy", (5, 6, 6), 1600.0, 3.0,
    causal={"pattern": "c1-2", "steps_per_chunk": [1]},
)  # fmt: skip
TEACHER = dataclasses.replace(STUDENT, kind="teacher")
BARE = dataclasses.replace(STUDENT, causal={}, sigma_max=80.0)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    params = init_params(STUDENT.model, jax.random.key(0))
    return save_model(tmp_path_factory.mktemp("model") / "student.safetensors", params, STUDENT)


def parsed(*flags):
    return sample_causal.parser().parse_args(list(flags))


@pytest.mark.parametrize(
    ("info", "flags", "want"),
    [
        (STUDENT, "", few_step_schedule([1])),
        (STUDENT, "--num_steps 4", few_step_schedule([4])),
        (STUDENT, "--num_steps 2 --sigma_max 80", few_step_schedule([2], sigma_max=80.0)),
        (STUDENT, "--mid_t 15/16 0.5", few_step_schedule([3], middle=(15 / 16, 0.5))),
        (STUDENT, "--mid_t 15/16,5/6 5/8 --num_steps 2", few_step_schedule([2])),
        (STUDENT, "--mid_t", few_step_schedule([1])),
        (STUDENT, "--steps_per_chunk 4 2", few_step_schedule([4, 2])),
        (STUDENT, "--distilled --num_steps 4 --steps_per_chunk 4 2 --mid_t_schedules 15/16,5/6,5/8;5/6",
         few_step_schedule([4, 2], middle_by_entry=[FOUR, (5 / 6,)])),
        (STUDENT, "--steps_per_chunk 4 1 --mid_t_schedules 15/16,5/6,5/8;",
         few_step_schedule([4, 1], middle_by_entry=[FOUR, ()])),
        (STUDENT, "--num_steps 2 --context_from_last_step", few_step_schedule([2], noisy_context_from=0)),
        (STUDENT, "--steps_per_chunk 4 2 --context_from_last_step --context_from_last_step_start_chunk 1",
         few_step_schedule([4, 2], noisy_context_from=1)),
        (STUDENT, "--steps_per_chunk 4 2 --image_path x.png", few_step_schedule([4, 4, 2])),
        (TEACHER, "", ode_schedule(50, guidance=3.0)),
        (TEACHER, "--num_steps 8 --guidance_scale 1.5 --timestep_shift 5", ode_schedule(8, shift=5.0, guidance=1.5)),
        (TEACHER, "--distilled", few_step_schedule([1])),
        (BARE, "--num_steps 2", few_step_schedule([2])),  # the published sigma_max, not that of bidirectional files
    ],
)  # fmt: skip
def test_flags_make_the_schedule(info, flags, want):
    assert sample_causal.schedule_from(parsed(*flags.split()), info) == want


def test_a_file_with_noisy_context_keeps_it_unless_told():
    info = dataclasses.replace(STUDENT, causal=STUDENT.causal | {"noisy_context_from": 1})
    for flags, want in (("", 1), ("--num_steps 2", 1), ("--mid_t 1/2", 1), ("--no-context_from_last_step", None),
                        ("--context_from_last_step", 0)):  # fmt: skip
        assert sample_causal.schedule_from(parsed(*flags.split()), info).noisy_context_from == want
    teacher = dataclasses.replace(info, kind="teacher")
    assert sample_causal.schedule_from(parsed(), teacher).noisy_context_from is None


def test_flags_make_the_network():
    network = sample_causal.network_from(parsed(), STUDENT, 5)
    assert (str(network.pattern), network.frames, network.size, network.window) == ("c1-2", 5, (6, 6), None)
    flags = ["--first_chunk_t", "3", "--chunk_t", "3", "--window", "4", "--sink", "1"]
    network = sample_causal.network_from(parsed(*flags), STUDENT, 33)
    assert (str(network.pattern), network.frames, network.window, network.sink) == ("c3-3", 33, 4, 1)
    assert str(sample_causal.network_from(parsed(*flags[:4]), BARE, 3).pattern) == "c3-3"
    assert CausalConfig(**STUDENT.causal).window == 0  # the file is what it was


def test_it_streams_a_video_that_is_the_written_one(tmp_path, student, capsys):
    args = ["--dit_path", str(student), "--num_samples", "2", "--window", "2", "--num_frames", "9"]
    whole, grown = tmp_path / "whole.mp4", tmp_path / "grown.mp4"
    sample_causal.main([*args, "--save_path", str(whole)])
    assert capsys.readouterr().out.strip() == str(whole)
    sample_causal.main([*args, "--save_path", str(grown), "--stream", "--profile", "--num_runs", "2"])
    out = capsys.readouterr().out
    for words in ("first decoded frame", "(2 latent frames)", "frames a second", "peak memory", "compilation", "GiB"):
        assert words in out
    frames = iio.imread(whole, plugin="pyav")
    assert frames.shape == (9, 192, 2 * 192 + 8, 3)
    assert np.abs(frames.astype(int) - iio.imread(grown, plugin="pyav")).mean() < 8  # lossy, both


def test_it_starts_from_an_image(tmp_path, student):
    picture = write_png(tmp_path / "p.png", moving(size=48)[3])
    args = ["--dit_path", str(student), "--image_path", str(picture), "--save_path", str(tmp_path / "v.mp4")]
    sample_causal.main(args)
    frames = iio.imread(tmp_path / "v.mp4", plugin="pyav")
    assert len(frames) == 5
    first = iio.imread(picture)[::2, ::2].repeat(8, axis=0).repeat(8, axis=1)
    assert np.abs(frames[0].astype(int) - first).mean() < 30  # through the world's codec, which knows other pictures


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--chunk_t 3", "chunk pattern c1-3 does not fit 5 latent frames; these do: c1-1, c1-2, c1-4"),
        ("--num_frames 6", "chunk pattern c1-2 does not fit 6 latent frames; these do: c1-1, c1-5"),
        ("--chunk_t 0", "both sizes must be at least 1"),
        ("--num_steps 5", "5 steps must be 1..4"),
        ("--num_steps 0", "0 steps must be 1..4"),
        ("--mid_t 5/8 5/6", "must fall from at most 1 to 0"),
        ("--mid_t 5/8 half", "--mid_t '5/8 half' must be numbers or fractions"),
        ("--mid_t 1/0", "--mid_t '1/0' must be numbers or fractions"),
        ("--steps_per_chunk 4 2 --mid_t_schedules 15/16,5/6,5/8", "1 schedules of middle times for 2 step counts"),
        ("--steps_per_chunk 2 --mid_t_schedules 5/6,5/8", "2 steps need 1 middle times, not 2"),
        ("--steps_per_chunk 1 1 1 1", "times for 4 chunks; the video has 3"),
        ("--mid_t_schedules 5/6", "--mid_t_schedules needs --steps_per_chunk"),
        ("--context_from_last_step --context_from_last_step_start_chunk 3", "=3 is beyond the last chunk, 2"),
        ("--context_from_last_step_start_chunk 1", "needs --context_from_last_step"),
        ("--window 1 --sink 2", "window=1 is smaller than sink=2"),
        ("--sigma_max 0", "--sigma_max=0.0"),
        ("--guidance_scale 3", "--guidance_scale is for an ODE; the network is sampled in few steps"),
        ("--prompt purple", "purple"),
        ("--num_samples 0", "--num_samples=0 must be at least 1"),
        ("--num_frames 0", "--num_frames=0 must be at least 1"),
        ("--seed -1", "--seed=-1 must be at least 0"),
        ("--image_path nowhere.png", "--image_path nowhere.png is not a picture that can be read"),
        ("--image_path {picture} --first_chunk_t 3", "an image is a first chunk of 1 latent frame"),
        ("--model toy", "give --model or --dit_path, not both"),
    ],
)
def test_it_refuses_and_overwrites_nothing(tmp_path, student, flags, message):
    path = write_video(tmp_path / "v.mp4", moving(), fps=8)
    picture = write_png(tmp_path / "p.png", moving()[0])
    before = path.read_bytes()
    flags = flags.format(picture=picture).split()
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
    fails(sample_causal.main, [*flags, str(teacher), "--steps_per_chunk", "2"], "--steps_per_chunk is for --distilled")
    wan = save_model(tmp_path / "w.safetensors", params, dataclasses.replace(STUDENT, world="wan"))
    fails(
        sample_causal.main, [*flags, str(wan)], "is of the world 'wan'; this version streams files of the world 'toy'"
    )
    fails(sample_causal.main, [*flags, str(student), "--save_path", "v.avi"], "v.avi must end in .mp4")
    assert not (tmp_path / "v.mp4").exists()
    monkeypatch.setitem(BUILTIN, "toy_causal", tmp_path / "toy_causal_student.safetensors")
    fails(sample_causal.main, ["--model", "toy"], "this copy of the package has no toy_causal_student.safetensors")
