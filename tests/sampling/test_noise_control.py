"""How noisy a chunk of input is made, and down which times it goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.sampling.noise_control import InputNoise, begin_chunk
from rcm_jax.sampling.schedules import few_step_schedule, ode_schedule

Z, NOISE = jax.random.normal(jax.random.key(0), (2, 1, 2, 3, 3, 4))
GREY = np.zeros((1, 4, 6, 6, 3), np.float32)
OWN = few_step_schedule([4, 1], noisy_context_from=1)


@pytest.mark.parametrize(
    ("how", "own", "times"),
    [
        (InputNoise(0.8), OWN, ((0.8, 5 / 8, 0), (0.8, 0))),
        (InputNoise(0.9, "motion"), OWN, ((0.9, 5 / 6, 5 / 8, 0), (0.9, 0))),
        (InputNoise(0.3), OWN, ((0.3, 0), (0.3, 0))),
        (InputNoise(5 / 8), OWN, ((5 / 8, 0), (5 / 8, 0))),
        (InputNoise(1.0), OWN, OWN.times),
        (InputNoise(0.8, "published"), OWN, ((0.7, 0.5, 0),)),
        (InputNoise(0.8, "published", 1), OWN, ((0.7, 0),)),
        (InputNoise(0.4), ode_schedule(4, shift=1.0, sigma_max=3.0), ((0.4, 0.375, 0.1875, 0),)),
    ],
)
def test_steps_above_the_noise_are_left_out(how, own, times):
    schedule = how.schedule(own)
    np.testing.assert_allclose(np.concatenate(schedule.times), np.concatenate(times))
    assert (schedule.noisy_context_from, schedule.ode) == (own.noisy_context_from, own.ode)


@pytest.mark.parametrize(("rule", "lowest"), [("fixed", 0), ("motion", 0.1), ("published", 0.7)])
def test_the_level_leaves_room_below(rule, lowest):
    assert InputNoise(0.9, rule).lowest == lowest
    assert InputNoise(0.9, "published", 1).lowest == 0.2


def begins(how, *videos, times=(0.8, 0.6, 0.0)):
    before, out = None, []
    for video in videos:
        begin, before = begin_chunk(how, times, video, Z, NOISE, before)
        out.append((begin, float(before.level)))
    return out


def test_a_fixed_level_whatever_moves():
    for (start, times), level in begins(InputNoise(0.8), GREY, GREY + 1):
        np.testing.assert_allclose(start, 0.8 * NOISE + 0.2 * Z, atol=1e-6)
        np.testing.assert_allclose(times, [0.8, 0.6, 0], atol=1e-6)
        assert level == pytest.approx(0.8)


def test_more_motion_is_less_noise():
    jump, step = GREY.copy(), GREY + 0.1
    jump[:, 2:] = 1.0  # within the chunk: as much as counts
    (_, first), (_, still), (_, moved), (begin, after) = begins(InputNoise(0.8, "motion"), GREY, GREY, step, jump + 0.1)
    assert (first, still) == (pytest.approx(0.8), pytest.approx(0.8))
    assert moved == pytest.approx(0.9 * 0.75 + 0.1 * 0.8)  # 0.1 from the chunk before is half of what counts
    assert after == pytest.approx(0.9 * 0.7 + 0.1 * moved)
    np.testing.assert_allclose(begin.times, np.array([0.8, 0.6, 0]) * after / 0.8, atol=1e-6)
    np.testing.assert_allclose(begin.start, after * NOISE + (1 - after) * Z, atol=1e-6)


def test_the_published_first_time_is_below_the_noise():
    how = InputNoise(0.8, "published")
    (first, _), (second, level) = begins(how, GREY, GREY + 0.1, times=how.schedule(OWN).times[0])
    np.testing.assert_allclose(first.times, [0.7, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(first.start, 0.8 * NOISE + 0.2 * Z, atol=1e-6)
    assert level == pytest.approx(0.755)
    assert second.times[0] == pytest.approx(0.655, abs=0.0011)  # whole thousandths
    np.testing.assert_allclose(second.times[1:], [0.5, 0])
    np.testing.assert_allclose(second.start, level * NOISE + (1 - level) * Z, atol=1e-6)


def test_one_program_serves_all_later_chunks():
    how, before = InputNoise(0.7, "motion"), begin_chunk(InputNoise(0.7, "motion"), (0.7, 0.0), GREY, Z, NOISE, None)[1]
    sizes = []
    for shift in (0.1, 0.3, 0.2):
        _, before = begin_chunk(how, (0.7, 0.0), jnp.asarray(GREY + shift), Z, NOISE, before)
        sizes.append(begin_chunk._cache_size())
    assert sizes[0] == sizes[-1]
