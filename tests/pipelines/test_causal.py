"""Causal pipelines: a file sampled as it says or as told, rolled out or streamed, with the same numbers."""

import dataclasses
import types

import jax
import numpy as np
import pytest

import rcm_jax
from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkPattern
from rcm_jax.convert.load import load_params
from rcm_jax.data.config import DataConfig
from rcm_jax.media.pictures import to_uint8
from rcm_jax.model_file import ModelInfo, read_info, save_model
from rcm_jax.objectives.config import CausalConfig
from rcm_jax.pipelines.opening import open_pipeline
from rcm_jax.pipelines.options import FileOptions, SamplingOptions
from rcm_jax.pipelines.preview import PROMPTS, open_previews
from rcm_jax.pipelines.scoring import sample_row
from rcm_jax.pipelines.settings import sampler_from, schedule_from
from rcm_jax.sampling.noise import video_noises
from rcm_jax.sampling.rollout import rollout
from rcm_jax.sampling.schedules import few_step_schedule, ode_schedule
from rcm_jax.training.runs import model_info, train_recipe
from rcm_jax.wan.dit import DiT
from rcm_jax.worlds import toy
from tests.tiny import MODEL, perturbed_params, tiny_run
from tests.wan.tiny import write_wan

CAUSAL = CausalConfig(pattern="c1-2", steps_per_chunk=(2, 1), middle=((0.7,), ()), noisy_context_from=1)


RUN = tiny_run(
    method=dict(consistency="rf_scm", dmd_scale=0.0), causal=CAUSAL, sigma_max=1600.0, sample_every=1,
    data=DataConfig(batch_size=8, latent_shape=(3, 6, 6)),
)  # fmt: skip
INFO = model_info(RUN)
FIRST, FOUR = 1600 / 1601, (15 / 16, 5 / 6, 5 / 8)
STUDENT = ModelInfo(
    dataclasses.replace(MODEL, remat="none"), "student", "toy", (5, 6, 6), 1600.0, 3.0,
    causal={"pattern": "c1-2", "steps_per_chunk": [1]},
)  # fmt: skip
TEACHER = dataclasses.replace(STUDENT, kind="teacher")


@pytest.fixture(scope="module")
def params():
    return perturbed_params(MODEL, 3)


@pytest.fixture(scope="module")
def path(tmp_path_factory, params):
    return save_model(tmp_path_factory.mktemp("causal") / "m.safetensors", params, INFO)


def opened(tmp_path, info, params, **options):
    saved = save_model(tmp_path / "x.safetensors", params, info)
    return open_pipeline(FileOptions(dit_path=saved, **options))


# --- how a file is sampled --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "asked", "want"),
    [
        (STUDENT, {}, few_step_schedule([1])),
        (STUDENT, {"num_steps": 4}, few_step_schedule([4])),
        (STUDENT, {"num_steps": 2, "sigma_max": 80.0}, few_step_schedule([2], sigma_max=80.0)),
        (STUDENT, {"mid_t": ["15/16", "0.5"]}, few_step_schedule([3], middle=(15 / 16, 0.5))),
        (STUDENT, {"mid_t": (15 / 16, 0.5)}, few_step_schedule([3], middle=(15 / 16, 0.5))),
        (STUDENT, {"mid_t": ["15/16,5/6", "5/8"], "num_steps": 2}, few_step_schedule([2])),
        (STUDENT, {"mid_t": []}, few_step_schedule([1])),
        (STUDENT, {"steps_per_chunk": [4, 2]}, few_step_schedule([4, 2])),
        (STUDENT, {"num_steps": 4, "steps_per_chunk": [4, 2], "mid_t_schedules": "15/16,5/6,5/8;5/6"},
         few_step_schedule([4, 2], middle_by_entry=[FOUR, (5 / 6,)])),
        (STUDENT, {"steps_per_chunk": [4, 1], "mid_t_schedules": [FOUR, ()]},
         few_step_schedule([4, 1], middle_by_entry=[FOUR, ()])),
        (STUDENT, {"num_steps": 2, "context_from_last_step": True}, few_step_schedule([2], noisy_context_from=0)),
        (STUDENT, {"steps_per_chunk": [4, 2], "context_from_last_step": True, "context_from_last_step_start_chunk": 1},
         few_step_schedule([4, 2], noisy_context_from=1)),
        (STUDENT, {"steps_per_chunk": [4, 2], "image_path": "x.png"}, few_step_schedule([4, 4, 2])),
        (TEACHER, {}, ode_schedule(50, guidance=3.0)),
        (TEACHER, {"num_steps": 8, "guidance_scale": 1.5, "shift": 5.0}, ode_schedule(8, shift=5.0, guidance=1.5)),
        (INFO, {}, CAUSAL.schedule(1600.0)),
        (INFO, {"num_steps": 1}, CAUSAL.schedule(1600.0)),
        (INFO, {"num_steps": 2}, few_step_schedule([2], noisy_context_from=1)),
        (INFO, {"num_steps": 2, "mid_t": (5 / 6,)}, few_step_schedule([2], middle=(5 / 6,), noisy_context_from=1)),
        (INFO, {"context_from_last_step": False}, few_step_schedule([2, 1], middle_by_entry=[(0.7,), ()])),
        (dataclasses.replace(INFO, kind="teacher", guidance=2.0), {"num_steps": 4}, ode_schedule(4, guidance=2.0)),
    ],
)  # fmt: skip
def test_options_make_the_schedule(info, asked, want):
    assert schedule_from(SamplingOptions(**asked), info) == want


def test_a_file_says_how_it_is_sampled(path):
    assert read_info(path) == INFO
    assert CausalConfig(**INFO.causal) == CAUSAL
    stream = rcm_jax.load(path).stream()
    network = stream.start.network
    assert (str(network.pattern), network.frames, network.size, network.window) == ("c1-2", 3, (6, 6), None)
    assert stream.start.schedule.chunk(0) == ((FIRST, 0.7, 0.0), False)
    assert stream.chunk_frames == (1, 2)


def test_chunks_and_window_may_be_others(tmp_path, params):
    pipe = rcm_jax.load(opened(tmp_path, STUDENT, params).options.dit_path, first_chunk_t=3, chunk_t=3)
    network = pipe.stream(num_frames=33, window=4, sink=1).start.network
    assert (str(network.pattern), network.frames, network.window, network.sink) == ("c3-3", 33, 4, 1)
    assert pipe.stream(num_frames=3, window=0).start.network.window is None


def test_a_file_that_does_not_say_its_chunks_is_sampled_as_published(tmp_path, params):
    bare = dataclasses.replace(STUDENT, causal={}, sigma_max=80.0, guidance=5.0)
    asked = opened(tmp_path, bare, params, first_chunk_t=1, chunk_t=2)
    assert asked.info.causal == {"pattern": "c1-2"}
    assert schedule_from(SamplingOptions(num_steps=2), asked.info) == few_step_schedule([2])
    teacher = opened(tmp_path, bare, params, first_chunk_t=1, chunk_t=2, kind="teacher")
    assert schedule_from(SamplingOptions(), teacher.info) == ode_schedule(50, guidance=3.0)
    assert sampler_from(SamplingOptions(), opened(tmp_path, bare, params).info).sigma_max == 80.0
    with pytest.raises(ValueError, match="give first_chunk_t and chunk_t"):
        opened(tmp_path, bare, params, chunk_t=2)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_videos_are_the_rollouts_and_do_not_depend_on_the_batch(path):
    pipe = rcm_jax.load(path)
    whole = pipe.arrays(PROMPTS, seed=5, indices=[0, 1, 2])
    assert whole.shape == (3, 3, 24, 24, 3)
    np.testing.assert_allclose(pipe.arrays(PROMPTS[1], seed=5, indices=[1]), whole[1:2], atol=1e-5)
    assert np.abs(pipe.arrays(PROMPTS, seed=6, indices=[0, 1, 2]) - whole).max() > 0.1

    weights = load_params(pipe.opened.experts.sources[0], dtype="float32")
    network, schedule = CAUSAL.network(DiT(INFO.model), (3, 6, 6)), CAUSAL.schedule(1600.0)
    noises = video_noises(network, schedule, 5, [0, 1, 2])
    latents = jax.jit(lambda w: rollout(network, w, toy.encode_text(PROMPTS), noises, schedule, frames=3))(weights)
    np.testing.assert_allclose(toy.ToyCodec.load().decode(latents), whole, atol=1e-4)
    parts = list(pipe.stream(PROMPTS, seed=5, indices=[0, 1, 2]))
    assert [part.shape for part in parts] == [(3, 1, 24, 24, 3), (3, 2, 24, 24, 3)]
    assert np.abs(np.concatenate(parts, axis=1).astype(int) - to_uint8(whole)).max() <= 1


@pytest.mark.slow
def test_a_guided_stream_leads_away_from_each_videos_own_negative_prompt(path):
    pipe = rcm_jax.load(path, kind="teacher")
    asked = dict(num_steps=2, guidance_scale=3.0)
    both = pipe.arrays(PROMPTS[:2], negative_prompt=[PROMPTS[2], ""], **asked)
    for i, negative in enumerate((PROMPTS[2], "")):
        alone = pipe.arrays(PROMPTS[i], negative_prompt=negative, **asked)
        np.testing.assert_allclose(both[i], alone[0], atol=1e-5)
    assert np.abs(pipe.arrays(PROMPTS[1], negative_prompt=PROMPTS[2], **asked)[0] - both[1]).max() > 0.01
    parts = list(pipe.stream(PROMPTS[:2], negative_prompt=[PROMPTS[2], ""], **asked))
    assert np.abs(np.concatenate(parts, axis=1).astype(int) - to_uint8(both)).max() <= 1


def test_a_stream_takes_prompts_on_the_way_and_starts_anew(path):
    pipe = rcm_jax.load(path, chunk_t=1)
    stream = pipe.stream(PROMPTS[0], num_frames=4, window=2)
    first = [part.copy() for part in stream]
    changed = []
    for part in stream:
        changed.append(part)
        if len(changed) == 1:
            stream.send(PROMPTS[1])
    np.testing.assert_array_equal(np.stack(changed[:2]), np.stack(first[:2]))  # the second was on its way
    assert np.abs(changed[2].astype(int) - first[2]).max() > 2
    with pytest.raises(ValueError, match="unknown words"):
        stream.send("purple")
    for part, want in zip(stream, first, strict=True):
        np.testing.assert_array_equal(part, want)
    again = iter(stream)
    for prompt in PROMPTS[1:3]:  # before the first chunk: the last one counts
        stream.send(prompt)
    np.testing.assert_array_equal(next(again), next(iter(pipe.stream(PROMPTS[2], num_frames=4, window=2))))
    assert jax.sharding.get_abstract_mesh().empty  # no mesh is left behind in the loop


@pytest.mark.long
def test_prompts_that_change_are_one_video_however_it_is_made(path):
    pipe = rcm_jax.load(path, chunk_t=1)
    asked = dict(num_frames=4, window=2, indices=[0, 1])
    timed = dict(prompts_file=[(0, PROMPTS[0]), (0.2, PROMPTS[1])], num_samples=2)  # 0.25 s: frame 2, chunk 2
    whole = pipe.arrays(**timed, **asked)
    parts = np.concatenate(list(pipe.stream(**timed, **asked)), axis=1)
    assert np.abs(parts.astype(int) - to_uint8(whole)).max() <= 1
    stream = pipe.stream(**timed, **asked)
    other = iter(stream)
    stream.send(PROMPTS[2])  # before the first chunk: in place of the plan, which the next loop follows again
    alone = pipe.stream(PROMPTS[2], num_samples=2, **asked)
    np.testing.assert_array_equal(np.concatenate(list(other), axis=1), np.concatenate(list(alone), axis=1))
    np.testing.assert_array_equal(np.concatenate(list(stream), axis=1), parts)
    plain = pipe.arrays(PROMPTS[0], num_samples=2, **asked)
    np.testing.assert_allclose(whole[:, :2], plain[:, :2], atol=1e-5)
    assert (np.abs(whole[:, 2:] - plain[:, 2:]).max((2, 3, 4)) > 0.02).all()

    asked.pop("num_frames")
    scenes = [f"{old}[.25s] | {new} [.25s]" for old, new in (PROMPTS[:2], PROMPTS[1:3])]
    np.testing.assert_allclose(pipe.arrays(scenes, **asked)[0], whole[0], atol=1e-5)
    start = pipe.stream(scenes, prompt_blend=3, **asked).start
    assert (start.changes.starts, start.changes.blend, start.frames) == ((0, 2), 3, 4)
    np.testing.assert_array_equal(np.stack(start.texts), [toy.encode_text(PROMPTS[:2]), toy.encode_text(PROMPTS[1:3])])
    old, new = toy.encode_text(PROMPTS[1:3])
    mixed = start.rows(np.array([1])).script.at(2)
    np.testing.assert_allclose(mixed, [old * 2 / 3 + new / 3], atol=1e-6)


def test_a_guided_video_whose_prompt_changes(path):
    pipe = rcm_jax.load(path, kind="teacher", chunk_t=1)
    asked = dict(num_steps=1, guidance_scale=3.0, num_frames=3)
    same = pipe.arrays(prompts_file=[(0, PROMPTS[0]), (0.1, PROMPTS[0])], negative_prompt=PROMPTS[2], **asked)
    np.testing.assert_allclose(same, pipe.arrays(PROMPTS[0], negative_prompt=PROMPTS[2], **asked), atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "asked", "message"),
    [
        (PROMPTS[0], {"prompts_file": [(0, "red")]}, "prompt and prompts_file both say what to show: give one"),
        (None, {"prompts_file": [(0, "red"), (9, "blue")]}, "prompts_file: 'blue' is at 9 s; the video ends at 0.375"),
        (None, {"prompts_file": [(0, "red"), (0.3, "blue")]}, "no chunk begins then or later: .* at 0.125 s"),
        (None, {"prompts_file": [(0, "red"), (0.1, "purple")]}, "unknown words"),
        (None, {"prompt_blend": 0}, "prompt_blend=0 must be at least 1"),
        ("red [1s] | blue [1s]", {"num_frames": 17}, "num_frames=17 and the lengths of the scenes in prompt both say"),
        ("red [1s] | blue [1s#]", {}, "prompt asks for a cut"),
        (["red [1s] | blue [1s]", "red [1s] | blue [2s]"], {}, "'red .1s. | blue .2s.' are not as long as those of"),
        (["red [1s] | blue [1s]", "red"], {}, "scene 1, 'red', does not end in its length"),
    ],
)
def test_changes_that_are_refused(path, prompt, asked, message):
    with pytest.raises(ValueError, match=message):
        rcm_jax.load(path).stream(prompt, **asked)


@pytest.mark.long
def test_wan_rolls_out_chunk_by_chunk(tmp_path):
    pipe = rcm_jax.load(
        write_wan(tmp_path / "wan"), first_chunk_t=1, chunk_t=1, kind="student", dtype="float32"
    )  # fmt: skip
    asked = dict(size="32x48", num_frames=9, num_steps=2, num_samples=2)
    videos = pipe("a red fox", **asked)
    assert [(video.prompt, video.index, video.fps) for video in videos] == [("a red fox", 0, 16), ("a red fox", 1, 16)]
    parts = np.concatenate(list(pipe.stream("a red fox", **asked)), axis=1)
    assert np.abs(parts.astype(int) - np.stack([video.frames for video in videos])).max() <= 1
    timed = dict(prompts_file=[(0, "a red fox"), (0.3, "snow")], prompt_blend=2)  # chunk 2 begins at 0.3125 s
    changed = pipe(**timed, **asked)
    np.testing.assert_array_equal(changed[0].frames[:5], videos[0].frames[:5])
    assert (changed[0].frames[5:] != videos[0].frames[5:]).any()
    parts = np.concatenate(list(pipe.stream(**timed, **asked)), axis=1)
    assert np.abs(parts.astype(int) - np.stack([video.frames for video in changed])).max() <= 1
    dit = DiT(pipe.info.model)
    network, schedule = CausalDiT(dit, ChunkPattern(1, 1), 3, (6, 4)), few_step_schedule([2])
    weights, text = load_params(pipe.opened.experts.sources[0], dtype="float32"), pipe.world.encode_text(["a red fox"])
    noises = video_noises(network, schedule, 0, [1])
    latents = jax.jit(lambda w: rollout(network, w, text, noises, schedule, frames=3))(weights)
    ((whole,),) = [[np.concatenate(list(parts))] for parts in pipe.world.decode(np.asarray(latents))]
    assert np.abs(to_uint8(whole).astype(int) - videos[1].frames).max() <= 1  # of 255: rounding


# --- who goes through it ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_evaluation_rolls_a_causal_file_out(tmp_path, path, params):
    pipe = rcm_jax.load(path)
    row = sample_row(pipe, list(PROMPTS[:2]), [4, 5], num_steps=1, label="")
    want = [pipe.arrays(PROMPTS[:2], seed=seed, indices=[0, 1]) for seed in (4, 5)]
    np.testing.assert_array_equal(row, np.concatenate(want))
    row = sample_row(pipe, list(PROMPTS[:1]), [4], num_steps=2, label="", middle=(0.6,))
    np.testing.assert_array_equal(row, pipe.arrays(PROMPTS[0], seed=4, num_steps=2, mid_t=(0.6,)))
    teacher = rcm_jax.load(path, kind="teacher")
    row = sample_row(teacher, list(PROMPTS[:1]), [4], num_steps=2, label="", middle=(0.6,))
    np.testing.assert_array_equal(row, teacher.arrays(PROMPTS[0], seed=4, num_steps=2))


def test_a_run_previews_and_leaves_a_causal_file(tmp_path, params, monkeypatch):
    state = types.SimpleNamespace(ema=params)

    def trained(*_, on_samples, **__):
        on_samples(1, state)
        return state

    monkeypatch.setattr("rcm_jax.training.runs.train", trained)
    teacher = save_model(tmp_path / "teacher.safetensors", params, INFO)
    config = dataclasses.replace(RUN, teacher=str(teacher))
    saved = train_recipe(config, tmp_path, open_samples=open_previews, progress="")
    assert read_info(saved).causal == INFO.causal
    assert (tmp_path / "samples" / "0000001.mp4").stat().st_size > 0
