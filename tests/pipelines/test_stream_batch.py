"""The stream batch as users ask for it: on the tiny student, and what is refused in one line."""

import dataclasses

import imageio.v3 as iio
import jax
import numpy as np
import pytest

import rcm_jax
from rcm_jax import sample_causal
from rcm_jax.causal.slots import SlotRing
from rcm_jax.errors import ArgumentError
from rcm_jax.media.video import write_video
from rcm_jax.model_file import save_model
from rcm_jax.pipelines.dry_run import dry_run
from rcm_jax.wan.networks import init_params
from tests.pipelines.test_incoming import INPUT, PROMPT, STUDENT, made
from tests.test_entry_points import fails

BATCH = {"stream_batch": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    info = dataclasses.replace(STUDENT, causal={"pattern": "c1-2", "steps_per_chunk": [2], "middle": [[0.6]]})
    params = init_params(info.model, jax.random.key(0))
    return save_model(tmp_path_factory.mktemp("model") / "student.safetensors", params, info)


@pytest.fixture(scope="module")
def pipe(path):
    return rcm_jax.load(path)


def test_its_settings_are_the_published_ones(pipe):
    def ring(**options):
        return pipe.stream(PROMPT, video=INPUT, **options).start.ring

    assert ring() is None
    assert ring(**BATCH) == SlotRing(6, 3, 0.2)
    assert ring(**BATCH, num_kv_cache=9, num_sink_tokens=0, adapt_sink_threshold=-1) == SlotRing(9, 0, -1)


@pytest.mark.slow
def test_all_of_the_input_comes_out_in_both_forms(pipe, tmp_path):
    file = write_video(tmp_path / "in.mp4", INPUT, 8)
    batch = made(pipe, file, **BATCH)
    assert batch.shape == (1, 9, 24, 24, 3)  # past the 5 frames of a cache that keeps all
    np.testing.assert_array_equal(pipe(PROMPT, video_path=file, **BATCH)[0].frames, batch[0])
    in_turn = made(pipe, file, **BATCH, one_by_one=True)
    assert in_turn.shape == batch.shape
    np.testing.assert_array_equal(in_turn[:, :1], batch[:, :1])
    assert np.abs(in_turn.astype(int) - batch).max() > 0


def test_a_camera_has_no_end_and_the_rule_may_be_published(pipe):
    video = (INPUT[i % 9] for i in range(10**9))
    stream = pipe.stream(PROMPT, video=video, noise_rule="published", **BATCH)
    assert stream.start.chunks is None
    parts = iter(stream)
    assert [next(parts).shape[1] for _ in range(6)] == [1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        (None, BATCH, "stream_batch is for input video: give video_path"),
        (INPUT, {"num_kv_cache": 6}, "num_kv_cache is for a stream batch: give stream_batch"),
        (INPUT, {"one_by_one": True}, "one_by_one is for a stream batch"),
        (INPUT, BATCH | {"window": 2}, "window does not apply: stream_batch has a cache of its own"),
        (INPUT, BATCH | {"sink": 0}, "sink does not apply"),
        (INPUT, BATCH | {"cache_policy": "memrope"}, "cache_policy does not apply"),
        (INPUT, BATCH | {"context_from_last_step": True}, "does not apply: stream_batch leaves every step's own keys"),
        (
            INPUT,
            BATCH | {"num_kv_cache": 4},
            "num_kv_cache=4 must be at least 5 with num_sink_tokens=3 and chunks",
        ),
        (
            INPUT,
            BATCH | {"adapt_sink_threshold": 0.5},
            "=0.5 is for chunks of one latent frame; the network's",
        ),
        (INPUT, BATCH | {"prompt_recache": "all"}, "prompt_recache does not apply: stream_batch has no keys"),
        (INPUT, BATCH | {"kv_dtype_k": "int8"}, "keeps keys as they are: leave out kv_dtype_k"),
        (INPUT, BATCH | {"adapt_sink_threshold": 2.0}, "adapt_sink_threshold=2.0 must be at least -1 and at most 1"),
        (
            INPUT,
            BATCH | {"steps_per_chunk": [2, 1]},
            "takes all chunks down the same steps: give num_steps",
        ),
    ],
)
def test_it_refuses(pipe, video, options, message):
    with pytest.raises(ArgumentError, match=message):
        pipe.stream(PROMPT, video=video, **options)


def test_a_teacher_and_several_devices_are_refused(path):
    with pytest.raises(ArgumentError, match="stream_batch is few-step sampling, of a student"):
        rcm_jax.load(path, kind="teacher").stream(PROMPT, video=INPUT, **BATCH)
    with pytest.raises(ArgumentError, match="stream_batch is for one GPU"):
        rcm_jax.load(path, fsdp=2).stream(PROMPT, video=INPUT, **BATCH)


def test_a_dry_run_says_that_it_knows_none(pipe):
    with pytest.raises(ArgumentError, match="dry_run knows no stream_batch"):
        dry_run(pipe, "h100", video_path="v.mp4", **BATCH)


@pytest.mark.slow
def test_the_command(path, tmp_path):
    file, out = write_video(tmp_path / "in.mp4", INPUT, 8), tmp_path / "out.mp4"
    flags = ["--dit_path", str(path), "--prompt", PROMPT, "--video_path", str(file), "--save_path", str(out)]
    sample_causal.main([*flags, "--stream", "--scale", "1", "--stream_batch", "--num_kv_cache", "7"])
    assert iio.imread(out, plugin="pyav").shape == (9, 24, 24, 3)
    fails(sample_causal.main, [*flags, "--stream_batch", "--num_kv_cache", "3"], "--num_kv_cache=3 must be at least 5")
