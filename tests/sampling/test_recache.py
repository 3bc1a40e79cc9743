"""Where the prompt changes, the past is seen as the new prompt would have it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.causal.network import CausalDiT
from rcm_jax.causal.policies import policy_of
from rcm_jax.chunks import ChunkPattern
from rcm_jax.sampling.prompts import PromptSchedule, Script
from rcm_jax.sampling.recache import Recache
from rcm_jax.sampling.rollout import chunk_noises
from rcm_jax.sampling.schedules import few_step_schedule
from rcm_jax.sampling.stream import stream
from rcm_jax.wan.dit import DiT
from tests.tiny import MODEL as TINY
from tests.tiny import perturbed_params

MODEL = dataclasses.replace(TINY, remat="none")
SIZE = (2, 4)
OLD, NEW = (jax.random.normal(jax.random.key(i), (2, 5, MODEL.text_dim)) for i in (3, 4))


@pytest.fixture(scope="module")
def params():
    return perturbed_params(MODEL)


def network(**kept):
    return CausalDiT(DiT(MODEL), ChunkPattern(1, 2), 9, SIZE, **kept)


def video(causal, params, script, recache, chunks=5):
    noises = chunk_noises(5, jnp.arange(2), 2, (*SIZE, MODEL.in_channels))
    how = {"chunks": chunks, "recache": recache}
    parts = stream(causal, params, script, noises, few_step_schedule([1]), lambda x, _: (x, None), **how)
    return np.concatenate(list(parts), axis=1)


@pytest.mark.parametrize("kept", [{}, {"window": 2, "sink": 1}])
def test_the_past_changes_with_the_prompt(params, kept):
    script = Script((OLD, NEW), PromptSchedule((0, 4)))
    plain, anew, sink = (video(network(**kept), params, script, how) for how in (None, "all", "keep_sink"))
    np.testing.assert_array_equal(anew[:, :7], plain[:, :7])
    assert np.abs(anew[:, 7:] - plain[:, 7:]).max() > 1e-3
    if kept:  # the sink's keys are of the old prompt
        assert np.abs(anew[:, 7:] - sink[:, 7:]).max() > 1e-3
    else:
        np.testing.assert_array_equal(anew, sink)


def test_only_the_frames_that_are_needed_are_remembered(params):
    recache = Recache(network(window=2, sink=1), params, "all")
    for i in range(20):
        recache.add(jnp.zeros((2, 2 if i else 1, *SIZE, MODEL.in_channels)))
    assert sum(part.shape[1] for part in recache._parts) <= 1 + 2 + 2 + 1  # sink, past, current; chunks stay whole


def test_what_cannot_be_made_anew(params):
    with pytest.raises(ValueError, match=r"only a cache of the last chunks, or of all, can be made anew, not MemRope"):
        Recache(network(policy=policy_of("memrope")), params, "all")
    with pytest.raises(ValueError, match=r"recache='some' must be one of all, keep_sink"):
        Recache(network(), params, "some")
