"""What a step draws: from which sampler of times, in which shapes, and nothing twice."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.objectives.config import CausalConfig, DiffusionConfig, MethodConfig, TimeSamplerConfig
from rcm_jax.objectives.draws import KINDS, Draws, draw

KEY = jax.random.key(4)
SHAPE = (4, 5, 2, 2, 3)
CLEAN = TimeSamplerConfig("lognormal", mean=-9.0, std=0.1)  # times near 0
NOISY = TimeSamplerConfig("lognormal", mean=9.0, std=0.1)  # times near 1
WHOLE, CAUSAL = CausalConfig(), CausalConfig(pattern="c1-2", steps_per_chunk=(3, 2))


def drawn(kind, causal=WHOLE, diffusion=None, shape=SHAPE, key=KEY, **method) -> Draws:
    return draw(kind, MethodConfig(**method), causal, diffusion or DiffusionConfig(), key, shape)


@pytest.mark.parametrize("causal", [WHOLE, CAUSAL], ids=["bidirectional", "causal"])
def test_p_G_is_for_the_own_loss_and_p_D_for_the_scores(causal):
    student, critic = (drawn(kind, causal, consistency="rf_scm", p_G=CLEAN, p_D=NOISY) for kind in KINDS[:2])
    teacher = drawn("diffusion", causal, name="diffusion", p_G=CLEAN, p_D=NOISY)
    for t in (student.t, teacher.t):
        assert t.shape == (4,)
        assert t.max() < 0.01
    for draws in (student, critic):
        assert draws.score_t.shape == (4,)
        assert draws.score_t.min() > 0.99
        if causal is WHOLE:
            assert draws.simulation_t.shape == (3, 4)
            assert draws.simulation_t.min() > 0.99


def test_noises_have_the_shapes_of_their_samplers():
    student = drawn("student")
    assert student.simulation_noises.shape == (4, *SHAPE)  # the start, and three between four steps
    assert student.noise.shape == student.score_noise.shape == SHAPE
    assert student.context_noise is None
    assert drawn("student", max_simulation_steps=1).simulation_t.shape == (0, 4)
    causal = drawn("student", CAUSAL, consistency="rf_scm", max_simulation_steps=3)
    assert causal.simulation_noises.shape == (4, *SHAPE)  # one a step of the longest chunk, one for the context
    assert causal.context_noise.shape == SHAPE


@pytest.mark.parametrize("causal", [WHOLE, CAUSAL], ids=["bidirectional", "causal"])
def test_nothing_is_drawn_twice_and_the_key_decides(causal):
    for kind in KINDS:
        method = {"name": "diffusion"} if kind == "diffusion" else {"consistency": "rf_scm"}
        first, again, other = (drawn(kind, causal, key=k, **method) for k in (KEY, KEY, jax.random.key(5)))
        jax.tree.map(np.testing.assert_array_equal, first, again)
        noises = [x for x in jax.tree.leaves(first) if x.shape == SHAPE]
        if first.simulation_noises is not None:
            noises += list(first.simulation_noises)
        noises += [x for x in jax.tree.leaves(other) if x.shape == SHAPE]
        for a, b in itertools.combinations(noises, 2):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.3


def test_a_method_draws_what_it_uses():
    assert drawn("student", dmd_scale=0.0).score_t is None
    pure = drawn("student", consistency="", tangent_warmup=0)
    assert pure.noise is None
    assert pure.t is None
    dcm = drawn("student", consistency="dcm")
    assert dcm.t is None
    assert bool(((dcm.u >= 0) & (dcm.u < 1)).all())
    assert drawn("student", dmd_fixed_times=True).simulation_t is None
    with pytest.raises(ValueError, match=r"kind 'fake_score' are unknown; use one of \('student', 'critic'"):
        drawn("fake_score")


def test_text_is_dropped_for_a_part():
    assert drawn("diffusion", name="diffusion").dropped is None  # published teachers come trained
    shape = (2000, 1, 1, 1, 1)
    for causal in (WHOLE, CausalConfig(pattern="c1-1")):
        draws = drawn("diffusion", causal, DiffusionConfig(text_dropout=0.2), shape, name="diffusion")
        assert 0.16 < float(draws.dropped.mean()) < 0.24


def test_a_part_of_the_samples_has_rising_times():
    t = drawn("diffusion", diffusion=DiffusionConfig(frame_times=0.5), shape=(400, 6, 1, 1, 1), name="diffusion").t
    assert t.shape == (400, 6)
    own = np.asarray((jnp.diff(t, axis=1) > 0).any(axis=1))
    assert 0.4 < own.mean() < 0.6
    assert bool((jnp.diff(t, axis=1) >= 0).all())
    assert bool((t[~own] == t[~own][:, :1]).all())


@pytest.mark.parametrize("times", ["independent", "shared", "fopp"])
def test_diffusion_forcing_has_a_time_a_chunk(times):
    causal = CausalConfig(pattern="c1-2", forcing="df", df_times=times)
    t = drawn("diffusion", causal, name="diffusion", p_G=CLEAN).t
    assert t.shape == (4, 3)
    assert t.max() < 0.01
    assert bool((t == t[:, :1]).all()) == (times == "shared")


def test_parts_are_parts():
    for name in ("text_dropout", "frame_times"):
        with pytest.raises(ValueError, match=rf"diffusion.{name}=1.5 must be at least 0 and at most 1"):
            DiffusionConfig(**{name: 1.5})
