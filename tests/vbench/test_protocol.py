"""What Wan's networks are sampled with where the command does not say."""

import dataclasses

import numpy as np
import pytest

import rcm_jax
from rcm_jax.sampling.few_step import few_step_times
from rcm_jax.sampling.sampler import SamplerConfig
from rcm_jax.vbench.protocol import with_protocol
from rcm_jax.worlds.wan.negative import PROMPT
from tests.wan.tiny import write_wan

PUBLISHED = (1600 / 1601, 15 / 16, 5 / 6, 5 / 8, 0.0)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = write_wan(tmp_path_factory.mktemp("wan"))
    return lambda **options: rcm_jax.load(str(folder), **options)


def test_a_teacher(load):
    pipe = load(kind="teacher")
    options = with_protocol(pipe, {"size": "48x32"})
    assert pipe.sampling(**options) == SamplerConfig("euler", 50, guidance=5.0, shift=5.0)
    request = pipe.request("a fox", **options)
    assert (request.num_frames, request.negative_prompts) == (81, [PROMPT])


def test_a_causal_teacher(load):
    pipe = load(kind="teacher", first_chunk_t=1, chunk_t=4)
    options = with_protocol(pipe, {"size": "48x32"})
    schedule = pipe.sampling(**options)
    assert schedule.ode
    assert (len(schedule.times[0]), schedule.guidance) == (51, 3.0)
    assert schedule == pipe.sampling(num_steps=50, guidance_scale=3.0, shift=3.0)
    assert pipe.request("a fox", **options).num_frames == 81


def test_a_causal_student(load):
    pipe = load(kind="student", first_chunk_t=1, chunk_t=1)
    options = with_protocol(pipe, {"size": "48x32"})
    assert pipe.sampling(**options).times == (pytest.approx(PUBLISHED),)
    assert pipe.request("a fox", **options).num_frames == 81
    assert pipe.sampling(**with_protocol(pipe, {"num_steps": 2})).times == (pytest.approx((*PUBLISHED[:2], 0.0)),)


def test_a_causal_student_keeps_the_schedule_of_its_file(load):
    pipe = load(kind="student", first_chunk_t=1, chunk_t=1)
    own = pipe.info.causal | {"steps_per_chunk": [2], "middle": [[0.7]]}
    pipe.info = dataclasses.replace(pipe.info, causal=own, sigma_max=80.0)
    assert pipe.sampling(**with_protocol(pipe, {})).times == (pytest.approx((80 / 81, 0.7, 0.0)),)


@pytest.mark.parametrize("given", [dict(num_frames=5), dict(guidance_scale=7.0, sampler="unipc"), dict(num_steps=20)])
def test_what_is_given_stays(load, given):
    pipe = load(kind="teacher")
    assert with_protocol(pipe, given).items() >= given.items()


def test_the_built_in_world_has_none():
    assert with_protocol(rcm_jax.load("toy"), {"seed": 3}) == {"seed": 3}


@pytest.mark.parametrize("steps", [None, 4, 2, 1])
def test_a_student(load, steps):
    """As many of the published times as its steps need."""
    given = {} if steps is None else {"num_steps": steps}
    options = with_protocol(load(kind="student"), given)
    count = steps or 4
    assert options == {
        "num_frames": 81, "sigma_max": 1600.0, "num_steps": count, "mid_t": PUBLISHED[1:count]
    }  # fmt: skip
    assert "num_steps" not in with_protocol(load(kind="student"), {"mid_t": "0.9,0.5"})


@pytest.mark.parametrize("steps", [4, 2])
def test_a_student_s_sampler(load, steps):
    pipe = load(kind="student")
    options = with_protocol(pipe, {"size": "48x32", "num_steps": steps})
    sampler = pipe.sampling(**options)
    times = few_step_times(sampler.num_steps, sampler.sigma_max, sampler.angles)
    np.testing.assert_allclose(times, (*PUBLISHED[:steps], 0.0))
    assert pipe.request("a fox", **options).num_frames == 81
