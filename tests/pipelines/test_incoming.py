"""Video in, video out: how much of the input is made anew, from where, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

import rcm_jax
from rcm_jax.errors import ArgumentError
from rcm_jax.media.pictures import to_uint8
from rcm_jax.media.video import write_video
from rcm_jax.model_file import ModelInfo, save_model
from rcm_jax.wan.networks import init_params
from rcm_jax.worlds import toy
from tests.tiny import MODEL

STUDENT = ModelInfo(
    dataclasses.replace(MODEL, remat="none"), "student", "toy", (5, 6, 6), 1600.0, 3.0,
    causal={"pattern": "c1-2", "steps_per_chunk": [1]},
)  # fmt: skip
INPUT = to_uint8(toy.batch(7, [0])[0][0])  # 9 frames
PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    params = init_params(STUDENT.model, jax.random.key(0))
    return save_model(tmp_path_factory.mktemp("model") / "student.safetensors", params, STUDENT)


@pytest.fixture(scope="module")
def pipe(path):
    return rcm_jax.load(path)


def made(pipe, video, **options):
    return np.concatenate(list(pipe.stream(PROMPT, video=video, **options)), axis=1)


def seen(frames):
    """Through the codec."""
    codec = toy.ToyCodec.load()
    return to_uint8(np.asarray(codec.decode(codec.encode(frames[None] / 127.5 - 1)))[0]).astype(int)


def test_little_noise_keeps_the_input_and_much_does_not(pipe):
    kept, lost = (made(pipe, INPUT, noise_scale=s, num_samples=2) for s in (0.02, 1.0))
    assert kept.shape == (2, 5, 24, 24, 3)
    assert np.abs(kept - seen(INPUT)[:5]).mean() < 4  # of 255
    assert np.abs(lost - seen(INPUT)[:5]).mean() > 20
    assert np.abs(kept[0].astype(int) - kept[1]).max() > 0  # their noises differ


def test_all_ways_in_are_one(pipe, tmp_path):
    options = {"noise_scale": 0.7, "noise_rule": "motion", "num_frames": 3}
    want = made(pipe, INPUT, **options)
    stream = pipe.stream(PROMPT, video=INPUT, **options)
    for _ in range(2):  # and every run over a stream is the same
        np.testing.assert_array_equal(np.concatenate(list(stream), axis=1), want)
    np.testing.assert_array_equal(made(pipe, iter(INPUT), **options), want)
    file = write_video(tmp_path / "in.mp4", INPUT, 8)
    from_file = made(pipe, file, **options)
    np.testing.assert_array_equal(from_file, made(pipe, None, video_path=file, **options))
    np.testing.assert_array_equal(from_file[0], pipe(PROMPT, video_path=file, **options)[0].frames)
    assert np.abs(from_file - want.astype(int)).mean() < 12  # the file is lossy


@pytest.mark.parametrize(
    ("video", "options", "frames"),
    [
        (INPUT, {}, 5),  # no window: the cache has the file's length
        (INPUT, {"window": 2}, 9),
        (INPUT[:8], {"window": 2}, 7),
        (INPUT[:4], {}, 3),
        (INPUT, {"num_frames": 7}, 7),
        (iter(INPUT), {}, 5),
        (iter(INPUT[:4]), {}, 3),  # known only when it ends
        ((frame for frame in INPUT[:8]), {"window": 2}, 7),
    ],
)
def test_it_goes_as_far_as_the_input(pipe, video, options, frames):
    assert made(pipe, video, **options).shape[1] == frames


def test_a_camera_has_no_end(pipe):
    stream = pipe.stream(PROMPT, video=(INPUT[i % 9] for i in range(10**9)), window=2)
    assert stream.start.chunks is None
    parts = iter(stream)
    assert [next(parts).shape[1] for _ in range(6)] == [1, 2, 2, 2, 2, 2]


def test_the_published_rule_has_its_own_times(pipe):
    def times(**options):
        return pipe.stream(PROMPT, video=INPUT, **options).start.schedule.times

    assert times(num_steps=4) == ((0.8, 5 / 8, 0.0),)
    assert times(noise_rule="published") == ((0.7, 0.5, 0.0),)
    assert times(noise_rule="published", num_steps=3) == ((0.7, 0.5, 0.4, 0.0),)


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        (None, {"noise_scale": 0.5}, "noise_scale is for input video: give video_path"),
        (None, {"noise_rule": "motion"}, "noise_rule is for input video"),
        (INPUT, {"noise_scale": 0.0}, "noise_scale=0.0 must be above 0 and at most 1"),
        (INPUT, {"noise_scale": 0.1, "noise_rule": "motion"}, "=0.1 must be above 0.1 with noise_rule=motion"),
        (INPUT, {"noise_scale": 0.7, "noise_rule": "published"}, "=0.7 must be above 0.7 with noise_rule=published"),
        (INPUT, {"noise_rule": "less"}, "noise_rule=less must be one of fixed, motion, published"),
        (INPUT, {"noise_rule": "published", "mid_t": [0.5]}, "mid_t does not apply: noise_rule=published has times"),
        (INPUT, {"num_frames": 11}, "video has 9 frames at 8 a second, fewer than num_frames=11"),
        (INPUT[:0], {}, "video has 0 frames at 8 a second; the first chunk takes 1"),
        (INPUT[:, :20], {}, r"frames of shape \(20, 24, 3\) in uint8; the network takes \(24, 24, 3\)"),
        (INPUT, {"image_path": __file__}, "there is no|is not an image"),
        (INPUT, {"steps_per_chunk": [1, 1, 1, 1, 1, 1]}, "times for 6 chunks; the video has 3"),
    ],
)
def test_it_refuses(pipe, video, options, message):
    with pytest.raises((ArgumentError, ValueError), match=message):
        pipe.stream(PROMPT, video=video, **options)


def test_a_bidirectional_network_has_no_chunks_to_begin():
    with pytest.raises(ArgumentError, match="video_path does not apply: toy is not causal"):
        rcm_jax.load("toy")(PROMPT, video_path="v.mp4")


def test_a_teacher_has_no_published_steps(path):
    teacher = rcm_jax.load(path, kind="teacher")
    with pytest.raises(ArgumentError, match="noise_rule=published is few-step sampling, of a student"):
        teacher.stream(PROMPT, video=INPUT, noise_rule="published")
    schedule = teacher.stream(PROMPT, video=INPUT, noise_scale=0.5, num_steps=4).start.schedule
    assert schedule.ode
    assert schedule.times[0][0] == 0.5


def test_a_record_is_of_input_that_is_in_a_file(pipe, tmp_path):
    file = write_video(tmp_path / "in.mp4", INPUT, 8)
    about = pipe.stream(PROMPT, video=file, noise_scale=0.6).about
    assert about["options"]["video_path"] == str(file)
    assert about["options"]["noise_scale"] == 0.6
    assert about["files"][str(file)]["bytes"] == file.stat().st_size
    assert "options" not in pipe.stream(PROMPT, video=INPUT).about
