"""Every causal method takes its steps: what it should move moves, the rest stands still."""

import dataclasses

import jax
import numpy as np
import pytest

from rcm_jax.objectives.config import CausalConfig, DiffusionConfig
from rcm_jax.objectives.networks import Networks
from rcm_jax.training.abstract import abstract_networks
from rcm_jax.training.state import abstract_state, init_state
from rcm_jax.training.step import make_steps
from tests.tiny import MODEL, RandomSource, perturbed_params, tiny_run

METHODS = {
    "tf": (dict(name="diffusion"), {}),
    "df": (dict(name="diffusion"), dict(forcing="df", df_times="fopp", weighting="gaussian_bell")),
    "tf_scm": (dict(consistency="rf_scm", dmd_scale=0.0), {}),
    "tf_dcm, noisy context": (dict(consistency="dcm", dmd_scale=0.0, dcm_shift=3.0), dict(noisy_context_from=1)),
    "sf_dmd": (dict(consistency="", tangent_warmup=0, max_simulation_steps=2), dict(steps_per_chunk=(2, 1))),
    "tf_scm_sf_dmd": (
        dict(consistency="rf_scm", max_simulation_steps=2),
        dict(steps_per_chunk=(2,), noisy_context_from=1, replay=False),
    ),
}


def run_config(name, pattern="c1-2", frames=3, **changes):
    method, causal = METHODS[name]
    config = tiny_run(method=method, causal=CausalConfig(pattern=pattern, **causal), score_teacher="given", **changes)
    data = dataclasses.replace(config.data, latent_shape=(frames, 4, 4), batch_size=2)
    return dataclasses.replace(config, data=data)


@pytest.fixture(scope="module")
def weights():
    return Networks(teacher=perturbed_params(MODEL), score_teacher=perturbed_params(MODEL, 2))


def moved(a, b):
    return {k for k in a if any(np.any(np.asarray(x) != np.asarray(y)) for x, y in
                                zip(jax.tree.leaves(a[k]), jax.tree.leaves(b[k]), strict=True))}  # fmt: skip


def one_step(config, step, weights, **kwargs):
    source = RandomSource(config)
    before = init_state(config, weights.teacher, weights.score_teacher)
    state = jax.tree.map(lambda x: x.copy(), before)
    after, metrics = make_steps(config, source.null_text, **kwargs)[step](state, weights, source.batch(0))
    return before, after, metrics


QUICK = ("tf_scm", "sf_dmd")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in METHODS]
)
def test_every_method_trains(name, weights):
    config = run_config(name)
    step = "diffusion" if config.method.name == "diffusion" else "student_dmd" if config.method.uses_dmd else "student"
    before, after, metrics = one_step(config, step, weights)
    assert moved(before.student, after.student) == set(before.student)
    assert metrics["skipped_updates"] == 0
    assert all(np.isfinite(v).all() for v in metrics.values())
    if config.method.uses_dmd:
        assert not moved(before.fake_score, after.fake_score)
        assert not moved(before.fake_score, weights.score_teacher)  # where it starts


@pytest.mark.long
def test_the_critic_moves_the_fake_score_alone(weights):
    before, after, metrics = one_step(run_config("sf_dmd"), "critic", weights)
    assert moved(before.fake_score, after.fake_score) == set(before.fake_score)
    assert not moved(before.student, after.student)
    assert metrics["masked"] == 0


def test_configs_that_cannot_be():
    with pytest.raises(ValueError, match="c1-4 does not fit 3 latent frames"):
        run_config("tf", pattern="c1-4")
    with pytest.raises(ValueError, match="self forcing needs score_teacher"):
        dataclasses.replace(run_config("sf_dmd"), score_teacher="")
    good = run_config("sf_dmd")
    for causal, message in (
        (dict(pattern="c1-2", window=1, steps_per_chunk=(2, 1)), "causal.window=1 must be 0"),
        (dict(pattern="c1-2"), "max_simulation_steps=2 must be the most of"),
        (dict(pattern="c1-2", steps_per_chunk=(2,), noisy_context_from=2), "noisy_context_from=2 is beyond"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(good, causal=CausalConfig(**causal))
    with pytest.raises(ValueError, match="use consistency 'rf_scm' or 'dcm'"):
        dataclasses.replace(good, method=dataclasses.replace(good.method, consistency="scm"))
    with pytest.raises(ValueError, match=r"frame_times=0.5 is for bidirectional teachers; under causal.pattern='c1-2'"):
        dataclasses.replace(good, diffusion=DiffusionConfig(frame_times=0.5))
    for wrong in (dict(forcing="sf"), dict(df_times="random"), dict(weighting="bell"), dict(steps_per_chunk=(5,))):
        with pytest.raises(ValueError, match="must be|unknown"):
            CausalConfig(**wrong)


LARGE = dataclasses.replace(MODEL, dim=32, num_layers=1)


@pytest.mark.slow
def test_scores_of_another_size_than_the_student(weights):
    """The score teacher and the fake score are large, the student and what it starts from are not."""
    config = run_config("sf_dmd", score_model=LARGE)
    larger = dataclasses.replace(weights, score_teacher=perturbed_params(LARGE))
    before, after, metrics = one_step(config, "student_dmd", larger)
    assert moved(before.student, after.student) == set(before.student)
    assert metrics["skipped_updates"] == 0
    before, after, _ = one_step(config, "critic", larger)
    assert moved(before.fake_score, after.fake_score) == set(before.fake_score)
    shapes = jax.tree.map(np.shape, (abstract_state(config).fake_score, abstract_networks(config).score_teacher))
    assert shapes[0] == shapes[1] == jax.tree.map(np.shape, larger.score_teacher)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(teacher_model=LARGE), "init is empty: a student of another size than its teacher"),
        (
            dict(teacher_model=LARGE, init="given", teacher="", method={"name": "diffusion"}),
            "teacher_model is the",
        ),
        (dict(score_model=dataclasses.replace(LARGE, text_dim=8)), "score_model.text_dim=8 must be the student's, 64"),
    ],
)
def test_sizes_that_do_not_go_together(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_run(**{"score_teacher": "given"} | changes)
