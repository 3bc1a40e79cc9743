"""Batches that teach nothing leave the state as it was; too many in a row end the run, with a report."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rcm_jax.training.guard import Guard, StoppedLearningError
from rcm_jax.training.loop import train
from rcm_jax.training.metrics import read_metrics
from rcm_jax.training.state import Weights
from tests.tiny import MODEL, RandomSource, perturbed_params, tiny_run

DEVICE, ALL = jax.devices()[:1], slice(None)


class Spoiled(RandomSource):
    """Batches with some samples' latents multiplied: by NaN, or by a lot."""

    def __init__(self, config, spoil):
        super().__init__(config)
        self.spoil = spoil  # step -> (samples, factor)

    def batch(self, step, rows=None):
        batch = super().batch(step, rows)
        if step not in self.spoil:
            return batch
        samples, factor = self.spoil[step]
        latents = batch.latents.copy()
        latents[samples] *= factor
        return dataclasses.replace(batch, latents=latents)


def run(config, spoil=None, workdir=None, **options):
    source = Spoiled(config, spoil or {})
    weights = Weights(teacher=perturbed_params(MODEL, 7))
    return train(config, source, workdir, weights=weights, devices=DEVICE, progress="", **options)


def scm(**changes):
    return tiny_run(method={"dmd_scale": 0.0}, **{"steps": 3, "microbatches": 2} | changes)


def assert_same_but_step(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.replace(step=0), b.replace(step=0))


class OneText(RandomSource):
    """Batches in which one sample alone has a text."""

    def batch(self, step, rows=None):
        batch = super().batch(step, rows)
        text = np.zeros_like(batch.text)
        text[3] = 1e3 * batch.text[3]
        return dataclasses.replace(batch, text=text)


def test_a_sample_whose_tangent_is_not_finite_is_left_out(tmp_path):
    """A teacher that overflows where there is a text: the student's value stays finite, its tangent does not."""
    student = perturbed_params(MODEL, 7)
    overflows = student | {"text_in": jax.tree.map(lambda x: 1e38 * x, student["text_in"])}
    config = scm(init="given")
    state = train(
        config, OneText(config), tmp_path, weights=Weights(teacher=overflows, init=student), devices=DEVICE, progress=""
    )
    for record in read_metrics(tmp_path):
        assert record["masked"] == 1
        assert record["skipped_updates"] == 0
        assert record["loss_consistency"] > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.student))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (state.student, student)), strict=True))


@pytest.mark.parametrize(
    "samples", [pytest.param([3], marks=pytest.mark.slow), pytest.param(ALL, marks=pytest.mark.long)]
)
def test_latents_that_are_not_finite_change_nothing(tmp_path, samples):
    config = scm()
    stayed = run(config, {2: (samples, np.nan)}, tmp_path)
    assert_same_but_step(stayed, run(dataclasses.replace(config, steps=2)))
    assert stayed.step == 3
    assert [r["skipped_updates"] for r in read_metrics(tmp_path)] == [0, 0, 1]


@pytest.mark.long
def test_as_many_in_a_row_as_are_allowed_end_the_run(tmp_path):
    config = scm(steps=9, stop_after=3, log_every=4)
    with pytest.raises(StoppedLearningError, match=r"3 updates in a row were left out, steps 4 to 6: loss consistency "
                       r"has no finite sample; .*stopped.json has the samples; saved before step 8"):  # fmt: skip
        run(config, {1: (ALL, np.nan), **dict.fromkeys((4, 5, 6), (ALL, np.nan))}, tmp_path)
    report = json.loads((tmp_path / "stopped.json").read_text())
    assert [r["step"] for r in report] == [4, 5, 6]
    assert report[0]["samples"]["consistency"] == RandomSource(config).keys(4)
    again = run(config, {}, tmp_path)
    assert again.step == 9
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(9))


def test_a_spike_is_left_out(tmp_path):
    method = {"name": "diffusion"}
    config = tiny_run(method=method, steps=26, optimizer={"spike": 20.0, "lr": 1e-4}, log_every=26)
    stayed = run(config, {25: (ALL, 100.0)}, tmp_path / "spike")
    assert_same_but_step(stayed, run(dataclasses.replace(config, steps=25)))
    last = read_metrics(tmp_path / "spike")[-1]
    assert (last["spikes"], last["skipped_updates"]) == (1, 1)
    assert last["grad_norm"] > 20 * read_metrics(tmp_path / "spike")[-2]["grad_norm"]


def metrics(**changes):
    good = {"loss_dmd": 1.0, "grad_norm": 2.0, "skipped_updates": 0, "spikes": 0, "bad_dmd": np.array([False, False])}
    return {k: np.asarray(v) for k, v in (good | changes).items()}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"loss_dmd": np.nan}, "loss dmd is nan"),
        ({"grad_norm": np.inf}, "the gradient's norm is inf"),
        ({"spikes": 1}, "a spike"),
        ({"bad_dmd": np.array([True, True])}, "loss dmd has no finite sample"),
    ],
)
def test_reasons(what, words):
    guard = Guard(2, lambda step: ["a", "b"])
    guard.check(0, "student", metrics(**what, skipped_updates=1))
    guard.check(1, "student", metrics())
    guard.check(2, "student", metrics(**what, skipped_updates=1))
    with pytest.raises(StoppedLearningError, match=f"steps 2 to 3: .*{words}"):
        guard.check(3, "student", metrics(**what, skipped_updates=1))


def test_without_a_limit_nothing_ends():
    guard = Guard(0, lambda step: ["a", "b"])
    for step in range(50):
        guard.check(step, "student", metrics(grad_norm=np.nan, skipped_updates=1))
