"""From prompts to videos by rollout: noise by (seed, index, chunk), and a causal file sampled as it says."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from rcm_jax.data.config import DataConfig
from rcm_jax.evaluate import sample_row
from rcm_jax.model_file import read_info, save_model
from rcm_jax.objectives.config import CausalConfig
from rcm_jax.sampling.generate_causal import generate_causal, video_noises
from rcm_jax.sampling.schedules import few_step_schedule, ode_schedule
from rcm_jax.sampling.stream import stream
from rcm_jax.training.runs import causal_network, causal_schedule, model_info, sampler_for, train_recipe
from rcm_jax.wan.networks import init_params
from rcm_jax.worlds import toy
from rcm_jax.worlds.world import open_world
from tests.tiny import MODEL, tiny_run

pytestmark = pytest.mark.usefixtures("compile_fast")
PROMPTS = ["a red circle moving left", "a blue square moving up", "a green diamond moving right"]
CAUSAL = CausalConfig(pattern="c1-2", steps_per_chunk=(2, 1), middle=((0.7,), ()), noisy_context_from=1)


RUN = tiny_run(
    method=dict(consistency="rf_scm", dmd_scale=0.0), causal=CAUSAL, sigma_max=1600.0, sample_every=1,
    data=DataConfig(batch_size=8, latent_shape=(3, 6, 6)),
)  # fmt: skip
INFO = model_info(RUN)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(3))


def videos(params, prompts=PROMPTS, schedule=None, **kwargs):
    schedule = schedule or causal_schedule(INFO)
    return generate_causal(params, causal_network(INFO), open_world("toy"), prompts, schedule=schedule, **kwargs)


def test_videos_do_not_depend_on_the_batch(params):
    whole = videos(params, seed=5)
    assert whole.shape == (3, 3, 24, 24, 3)
    np.testing.assert_allclose(videos(params, seed=5, batch_size=2), whole, atol=1e-5)
    assert np.abs(videos(params, seed=6) - whole).max() > 0.1

    network, schedule, world = causal_network(INFO), causal_schedule(INFO), open_world("toy")
    codec = toy.ToyCodec.load()
    parts = stream(
        network, params, world.encode_text(PROMPTS[2:]), video_noises(network, schedule, 5, [2]), schedule,
        jax.jit(lambda latents, _: (codec.decode(latents), None)),
    )  # fmt: skip
    np.testing.assert_allclose(np.concatenate(list(parts), axis=1), whole[2:], atol=1e-4)


def test_a_file_says_how_it_is_sampled(tmp_path, params):
    info = read_info(save_model(tmp_path / "m.safetensors", params, INFO))
    assert info == INFO
    assert CausalConfig(**info.causal) == CAUSAL
    network = causal_network(info)
    assert (str(network.pattern), network.frames, network.size, network.window) == ("c1-2", 3, (6, 6), None)

    assert causal_schedule(info) == causal_schedule(info, 1) == CAUSAL.schedule(1600.0)
    assert causal_schedule(info).chunk(0) == ((1600 / 1601, 0.7, 0.0), False)
    assert causal_schedule(info, 2) == few_step_schedule([2], noisy_context_from=1)
    assert causal_schedule(info, 2, (5 / 6,)) == few_step_schedule([2], middle=(5 / 6,), noisy_context_from=1)
    with pytest.raises(ValueError, match="5 steps must be 1..4"):
        causal_schedule(info, 5)
    teacher = dataclasses.replace(info, kind="teacher", guidance=3.0)
    assert causal_schedule(teacher) == ode_schedule(50, guidance=3.0)
    assert causal_schedule(teacher, 4) == ode_schedule(4, guidance=3.0)
    with pytest.raises(ValueError, match=r"causal \(c1-2\): use python -m rcm_jax.sample_causal"):
        sampler_for(info)


def test_evaluation_rolls_a_causal_file_out(tmp_path, params):
    path = save_model(tmp_path / "m.safetensors", params, INFO)
    row = sample_row(path, PROMPTS[:2], [4, 5], num_steps=1, label="")
    want = [videos(params, PROMPTS[:2], seed=seed) for seed in (4, 5)]
    np.testing.assert_allclose(row, np.concatenate(want), atol=1e-5)
    teacher = save_model(tmp_path / "t.safetensors", params, dataclasses.replace(INFO, kind="teacher", guidance=2.0))
    row = sample_row(teacher, PROMPTS[:1], [4], num_steps=2, label="")
    want = videos(params, PROMPTS[:1], schedule=ode_schedule(2, guidance=2.0), seed=4)
    np.testing.assert_allclose(row, want, atol=1e-5)


def test_a_run_previews_and_leaves_a_causal_file(tmp_path, params, monkeypatch):
    state = types.SimpleNamespace(ema=params)

    def trained(*_, on_samples, **__):
        on_samples(1, state)
        return state

    monkeypatch.setattr("rcm_jax.training.runs.train", trained)
    teacher = save_model(tmp_path / "teacher.safetensors", params, INFO)
    path = train_recipe(dataclasses.replace(RUN, teacher=str(teacher)), tmp_path, progress="")
    assert read_info(path).causal == INFO.causal
    assert (tmp_path / "samples" / "0000001.mp4").stat().st_size > 0
