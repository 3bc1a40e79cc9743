"""The door: one pipeline for every network; videos by (prompt, seed, index), whatever the batch and the device."""

import dataclasses
import inspect
import math
import re

import imageio.v3 as iio
import jax
import numpy as np
import pytest

import rcm_jax
from rcm_jax import sample, sample_causal
from rcm_jax.convert.load import load_params
from rcm_jax.errors import ArgumentError
from rcm_jax.model_file import ModelInfo, save_model
from rcm_jax.pipelines import bidirectional
from rcm_jax.pipelines.options import FileOptions, OutputOptions, SamplingOptions
from rcm_jax.pipelines.video import Video, side_by_side
from rcm_jax.sampling.few_step import few_step_times
from rcm_jax.sampling.noise import draw_noise
from rcm_jax.sampling.sampler import SamplerConfig, run_sampler
from rcm_jax.wan.dit import DiT, guided_velocity, velocity
from rcm_jax.wan.networks import init_params
from rcm_jax.worlds import toy
from tests.media.videos import moving
from tests.tiny import MODEL
from tests.wan.tiny import write_wan

PROMPTS = ["a red circle moving left", "a blue square moving up", "a green diamond moving right"]
STUDENT = ModelInfo(dataclasses.replace(MODEL, remat="none"), "student", "toy", (9, 6, 6))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    params = init_params(MODEL, jax.random.key(3))
    return save_model(tmp_path_factory.mktemp("model") / "student.safetensors", params, STUDENT)


@pytest.fixture(scope="module")
def pipe(student):
    return rcm_jax.load(student)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = write_wan(tmp_path_factory.mktemp("wan"))
    return rcm_jax.load(folder, dtype="float32"), rcm_jax.load(folder, dtype="float32", kind="student")


SMALL = dict(size="32x48", num_frames=5)


def frames(videos):
    return np.stack([video.frames for video in videos])


def test_a_call_is_the_samplers_numbers(pipe, student):
    """The pipeline against the library's own functions, network and noise bound by hand."""
    params = load_params(pipe.opened.experts.sources[0], dtype="float32")
    noise = draw_noise(5, [0, 1], (2, 9, 6, 6, MODEL.out_channels))
    network = velocity(DiT(STUDENT.model), params, toy.encode_text(PROMPTS[:1] * 2))
    latents = jax.jit(lambda noise: run_sampler(SamplerConfig("few_step", 2), network, noise))(noise)
    want = np.asarray(toy.ToyCodec.load().decode(latents))
    got = pipe.arrays(PROMPTS[0], num_steps=2, num_samples=2, seed=5)
    np.testing.assert_allclose(got, want, atol=1e-5)
    videos = pipe(PROMPTS[0], num_steps=2, num_samples=2, seed=5)
    assert np.abs(frames(videos) / 127.5 - 1 - got).max() <= 1 / 255 + 1e-6
    about = [(v.fps, v.seed, v.prompt, v.index, v.scale) for v in videos]
    assert about == [(8, 5, PROMPTS[0], 0, 8), (8, 5, PROMPTS[0], 1, 8)]


def test_videos_do_not_depend_on_the_batch(pipe):
    whole = pipe.arrays(PROMPTS, num_steps=2, seed=5)
    assert whole.shape == (3, 9, 24, 24, 3)
    np.testing.assert_allclose(pipe.arrays(PROMPTS, num_steps=2, seed=5, batch_size=2), whole, atol=1e-5)
    np.testing.assert_allclose(pipe.arrays(PROMPTS[1], num_steps=2, seed=5), whole[1:2], atol=1e-5)
    assert np.abs(pipe.arrays(PROMPTS, num_steps=2, seed=6) - whole).max() > 0.1
    own = pipe.arrays(PROMPTS, num_steps=2, seed=5, indices=[2, 0, 7])
    np.testing.assert_allclose(own[1], whole[1], atol=1e-5)
    assert np.abs(own[0] - whole[0]).max() > 0.1


def test_several_calls_are_the_calls(pipe):
    """In order, each with its own options."""
    calls = [(PROMPTS[0], dict(seed=1, num_steps=2)), (PROMPTS[1:], dict(seed=2, num_steps=1))]
    together = list(pipe.several(calls))
    alone = [video for prompt, options in calls for video in pipe(prompt, **options)]
    assert [(v.prompt, v.seed, v.index, v.about) for v in together] == [
        (v.prompt, v.seed, v.index, v.about) for v in alone
    ]
    np.testing.assert_array_equal(frames(together), frames(alone))
    with pytest.raises(ArgumentError, match="num_frames"):
        pipe.several([calls[0], (PROMPTS[1], dict(num_frames=1))])


def test_a_mesh_gives_the_same(student, pipe):
    spread = rcm_jax.load(student, fsdp=2, sequence=2)
    got = spread.arrays(PROMPTS, num_steps=2, seed=5)
    np.testing.assert_allclose(got, pipe.arrays(PROMPTS, num_steps=2, seed=5), atol=1e-4)


def test_a_teacher_is_guided_away_from_each_videos_own_negative_prompt(student):
    teacher = rcm_jax.load(student, kind="teacher")
    asked = dict(num_steps=2, sampler="euler", guidance_scale=4.0, seed=1)
    negatives = [PROMPTS[2], ""]
    both = teacher.arrays(PROMPTS[:2], negative_prompt=negatives, **asked)
    for i, negative in enumerate(negatives):
        alone = teacher.arrays(PROMPTS[i], negative_prompt=negative, **asked)
        np.testing.assert_allclose(both[i], alone[0], atol=1e-5)
    other = teacher.arrays(PROMPTS[1], negative_prompt=PROMPTS[2], **asked)
    assert np.abs(other[0] - both[1]).max() > 0.01  # not the first one's for all
    params = load_params(teacher.opened.experts.sources[0], dtype="float32")
    noise, null = draw_noise(1, [0], (1, 9, 6, 6, MODEL.out_channels)), toy.encode_text([PROMPTS[2]])[0]
    network = guided_velocity(DiT(STUDENT.model), params, toy.encode_text(PROMPTS[:1]), null, 4.0)
    latents = jax.jit(lambda noise: run_sampler(SamplerConfig("euler", 2), network, noise))(noise)
    np.testing.assert_allclose(both[:1], toy.ToyCodec.load().decode(latents), atol=1e-5)


def test_wan_goes_the_same_way(wan):
    """Prompt, text encoder, network step by step, autoencoder; several prompts and samples, alone and in a batch."""
    _, student = wan
    asked = dict(num_steps=2, num_samples=2, seed=3, **SMALL)
    videos = student(["a red fox", "two dogs run"], **asked)
    assert [(v.prompt, v.index, v.fps, v.scale) for v in videos] == [
        ("a red fox", 0, 16, 1), ("a red fox", 1, 16, 1), ("two dogs run", 0, 16, 1), ("two dogs run", 1, 16, 1),
    ]  # fmt: skip
    assert videos[0].frames.shape == (5, 48, 32, 3)
    alone = student("two dogs run", **asked | {"num_samples": 1})
    np.testing.assert_array_equal(alone[0].frames, videos[2].frames)
    assert not student.opened.experts._loaded  # a large network does not stay
    experts = student.opened.experts
    text = student.world.encode_text(["two dogs run"])
    params = load_params(experts.sources[0], dtype="float32")
    noise = draw_noise(3, [0], (2, 2, 6, 4, 16))
    latents = jax.jit(lambda n: run_sampler(SamplerConfig("few_step", 2), velocity(experts.dit, params, text), n))(
        noise
    )
    (parts,) = student.world.decode(np.asarray(latents))
    difference = (np.concatenate(list(parts)).clip(-1, 1) + 1) * 127.5 - videos[2].frames
    assert np.abs(difference).max() <= 1


def test_a_students_times_are_those_that_are_asked(pipe):
    """As `sample_few_step` has them; in the other form they are angles."""
    how = pipe.sampling(mid_t="15/16 5/6 5/8", sigma_max=1600.0)
    assert how.num_steps == 4
    times = few_step_times(4, how.sigma_max, how.angles)
    np.testing.assert_allclose(times, [1600 / 1601, 15 / 16, 5 / 6, 5 / 8, 0], rtol=1e-15)
    asked, published = {"num_steps": 2, "seed": 1}, (math.sin(1.5) / (math.cos(1.5) + math.sin(1.5)),)
    (plain,), (same,), (other,) = (
        pipe.arrays(PROMPTS[:1], **asked, **more) for more in ({}, {"mid_t": published}, {"mid_t": "5/8"})
    )
    np.testing.assert_allclose(same, plain, atol=1e-5)
    assert np.abs(other - plain).max() > 1e-2


def test_every_flag_is_a_keyword_with_the_same_default():
    shown = sample.parser().format_help() + sample_causal.parser().format_help()
    flags = set(re.findall(r"^  (?:-h, )?--(\w+)", shown, re.MULTILINE))
    keywords = {f.name for options in (FileOptions, SamplingOptions) for f in dataclasses.fields(options)}
    commands_own = {"help", "version", "model", "distilled", "stream", "profile", "warmup_iters",
                    "num_runs"}  # fmt: skip
    commands_own |= {f.name for f in dataclasses.fields(OutputOptions)}
    assert flags - commands_own == keywords - {"indices"}
    given = vars(sample.parser().parse_args([])) | vars(sample_causal.parser().parse_args([]))
    assert not keywords & given.keys()  # defaults stand in the options alone
    assert "prompt" in inspect.signature(rcm_jax.Pipeline.__call__).parameters


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p(num_steps=5), "num_steps=5 must be 1..4"),
        (lambda p: p(mid_t=[15 / 16, 5 / 6], num_steps=4), "num_steps=4 must be 1..3"),
        (lambda p: p(mid_t=[5 / 8, 5 / 6]), r"times \(0.9877, 0.625, 0.8333, 0.0\) must fall from at most 1 to 0"),
        (lambda p: rcm_jax.load("toy")(mid_t=[0.5]), "mid_t does not apply: the network is a teacher"),
        (lambda p: p(num_samples=0), "num_samples=0 must be at least 1"),
        (lambda p: p(seed=-1), "seed=-1 must be at least 0"),
        (lambda p: p(sigma_max=0.0), "sigma_max=0.0 must be above 0"),
        (lambda p: p(batch_size=0), "batch_size=0 must be at least 1"),
        (lambda p: p(guidance_scale=3), "guidance_scale does not apply: the network is a student; kind overrules that"),
        (lambda p: p(sampler="ddim"), "sampler=ddim must be one of euler, unipc"),
        (lambda p: p(window=3), "window does not apply: .* is not causal"),
        (lambda p: p(prompts_file="x", prompt_blend=2), "prompts_file, prompt_blend does not apply: .* is not causal"),
        (lambda p: p(size="32x32"), "size does not apply: .* is of the built-in world"),
        (lambda p: p(num_frames=5), "num_frames=5 does not apply: .* is of the built-in world: 9 frames"),
        (lambda p: p("a purple circle moving left"), "unknown words .'purple'.*red"),
        (lambda p: p([]), "prompt is an empty list"),
        (lambda p: p(PROMPTS, indices=[1]), "indices has 1 entries for 3 videos"),
        (lambda p: p(image_path="nowhere.png"), "there is no image at nowhere.png"),
        (lambda p: p.stream(), "does not say its chunk pattern: give first_chunk_t and chunk_t"),
        (lambda p: rcm_jax.load("toy", vae_path="x", dtype="float32"), "vae_path, dtype does not apply"),
        (lambda p: rcm_jax.load("toy", kind="critic"), "kind=critic must be one of teacher, student"),
        (lambda p: rcm_jax.load("toy", fsdp=3, sequence=3), "fsdp=3 times sequence=3 must be"),
        (lambda p: rcm_jax.load("toy", kind="teacher")(PROMPTS, negative_prompt=["", ""]), "2 entries for 3 prompts"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_computed(pipe, monkeypatch, call, words):
    monkeypatch.setattr(bidirectional, "run_sampler", lambda *_, **__: pytest.fail("computes"))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        call(pipe)


def test_an_unknown_keyword_and_a_missing_file(pipe):
    with pytest.raises(TypeError, match="num_step"):
        pipe(num_step=2)
    with pytest.raises(FileNotFoundError, match="no model file at nowhere"):
        rcm_jax.load("nowhere")


def test_arguments_are_named_as_the_caller_does():
    error = ArgumentError("{num_steps} is for {kind}; {not_one} of {3}", num_steps=7, kind=None)
    assert str(error) == "num_steps=7 is for kind; {not_one} of {3}"
    assert error.as_flags() == "--num_steps=7 is for --kind; {not_one} of {3}"


# --- videos ---------------------------------------------------------------------------------------------------------


def video(**changes):
    return Video(**{"frames": moving(), "fps": 8, "seed": 3, "prompt": 'a "red" <bar>'} | changes)


def test_a_video_saves_itself(tmp_path):
    path = video(scale=2).save(tmp_path / "new" / "v.mp4")
    assert iio.imread(path, plugin="pyav").shape == (6, 64, 64, 3)
    assert iio.immeta(path, plugin="pyav")["fps"] == 8
    np.testing.assert_array_equal(iio.imread(video().save(tmp_path / "v.gif")), moving())
    strip = iio.imread(video().save(tmp_path / "v.png"))
    assert strip.shape == (32, 5 * 32, 3)
    np.testing.assert_array_equal(strip[:, -32:], moving()[-1])
    with pytest.raises(ValueError, match=r"v.avi must end in .mp4, .gif or .png"):
        video().save(tmp_path / "v.avi")


def test_a_video_shows_itself():
    html = video()._repr_html_()
    assert html.startswith("<video ")
    assert "a &quot;red&quot; &lt;bar&gt; (seed 3, 0)" in html
    assert 'src="data:video/mp4;base64,AAAA' in html  # an MP4 begins with the length of its first box


def test_videos_side_by_side():
    other = moving()[::-1]
    joined = side_by_side([video(), video(frames=other)], gap=2)
    assert (joined.frames.shape, joined.prompt) == ((6, 32, 66, 3), video().prompt)
    np.testing.assert_array_equal(joined.frames[:, :, 34:], other)
