"""What a step draws: from which sampler of times, in which shapes, and nothing twice."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.losses.consistency import dcm_times
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


SIDES = {"high": (0.9, 1.0), "low": (0.0, 0.9)}
MANY = (4000, 1, 1, 1, 1)


@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("consistency", ["scm", "rf_scm", "dcm"])
def test_an_expert_draws_on_its_side(consistency, side):
    """Consistency, scores, simulation and diffusion alike; of dCM both ends of a step."""
    method = {"consistency": consistency, "t_range": side}
    student, critic = (drawn(kind, shape=MANY, **method) for kind in KINDS[:2])
    teacher = drawn("diffusion", shape=MANY, name="diffusion", **method)
    times = [teacher.t, student.score_t, critic.score_t, student.simulation_t, critic.simulation_t]
    if consistency == "dcm":
        c = MethodConfig(**method)
        u = student.u * (1 - c.dcm_skip / c.dcm_total_steps)
        times.append(dcm_times(u, total_steps=c.dcm_total_steps, skip=c.dcm_skip, shift=c.dcm_shift))
    else:
        times.append(student.t)
    for t in times:
        assert side[0] - 1e-6 <= t.min() < side[0] + 0.02
        assert side[1] - 0.02 < t.max() <= side[1] + 1e-6


@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
def test_an_expert_draws_what_all_draws_have_there(side):
    """Quantiles of the draws on a side against those of all draws that fall on it."""
    p = np.linspace(0.1, 0.9, 9)
    own, every = (drawn("student", shape=(20_000, 1, 1, 1, 1), t_range=r) for r in (side, (0.0, 1.0)))
    for name in ("t", "score_t"):
        got, kept = np.asarray(getattr(own, name)), np.asarray(getattr(every, name))
        kept = kept[(kept >= side[0]) & (kept <= side[1])]
        np.testing.assert_allclose(np.quantile(got, p), np.quantile(kept, p), atol=0.04 * (side[1] - side[0]))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"t_range": (0.9, 0.1)}, r"method.t_range=\(0.9, 0.1\) must be two RF times, the lower first"),
        ({"t_range": (0.9,)}, r"method.t_range=\(0.9,\) must be two"),
        ({"t_range": (0.0, 1.5)}, r"method.t_range=\(0.0, 1.5\) must be two"),
        ({"t_range": (float("nan"), 1.0)}, r"method.t_range=\(nan, 1.0\) must be two"),
        ({"t_range": (0.9, 1.0), "p_G": CLEAN}, r"t_range=\(0.9, 1.0\) has 0.0% of the times of method.p_G"),
        ({"t_range": (0.0, 0.9), "p_D": NOISY}, r"t_range=\(0.0, 0.9\) has 0.0% of the times of method.p_D"),
        ({"t_range": (0.97, 1.0), "consistency": "dcm", "dcm_skip": 8}, "has no room for method.dcm_skip=8 of 48"),
        ({"t_range": (0.9, 1.0), "dmd_fixed_times": True}, "max_simulation_steps=4: the sampler has 2 of its steps"),
    ],
)
def test_ranges_that_cannot_be_trained_are_refused(method, words):
    with pytest.raises(ValueError, match=words) as error:
        MethodConfig(**method)
    assert "\n" not in str(error.value)


def test_what_a_method_does_not_draw_may_lie_elsewhere():
    MethodConfig(t_range=(0.9, 1.0), p_G=CLEAN, consistency="dcm")
    MethodConfig(t_range=(0.9, 1.0), p_D=CLEAN, dmd_scale=0.0)
    MethodConfig(t_range=(0.9, 1.0), dmd_fixed_times=True, max_simulation_steps=2)
