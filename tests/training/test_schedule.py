"""The alternation, counted by hand."""

import pytest

from rcm_jax.objectives.config import MethodConfig
from rcm_jax.training.schedule import (
    critic_updates,
    is_student_step,
    simulation_steps,
    step_name,
    student_updates,
    warmup_ratio,
)


@pytest.mark.parametrize(("warmup", "frequency"), [(0, 5), (7, 5), (3, 1), (1000, 10)])
def test_counts_of_updates(warmup, frequency):
    config = MethodConfig(tangent_warmup=warmup, student_update_freq=frequency)
    student = fake = 0
    for step in range(warmup + 43):
        assert (student_updates(config, step), critic_updates(config, step)) == (student, fake)
        if is_student_step(config, step):
            student += 1
        else:
            fake += 1


def test_names_of_the_steps():
    config = MethodConfig(tangent_warmup=2, student_update_freq=3)
    names = [step_name(config, step) for step in range(9)]
    assert names == ["student"] * 2 + ["student_dmd", "critic", "critic"] * 2 + ["student_dmd"]
    pure = MethodConfig(dmd_scale=0.0)
    assert {step_name(pure, step) for step in range(50)} == {"student"}
    assert step_name(MethodConfig(name="diffusion"), 3) == "diffusion"


def test_simulated_steps_cycle_with_the_updates_of_that_network():
    """As the published trainer counts them: iterations 10, 15, 5 of the student, 8 of the critic, update every 5th."""
    config = MethodConfig(tangent_warmup=0, student_update_freq=5)
    assert [simulation_steps(config, student_updates(config, i)) for i in (5, 10, 15, 20)] == [2, 3, 4, 1]
    assert [simulation_steps(config, critic_updates(config, i)) for i in (1, 2, 3, 4, 6, 8)] == [1, 2, 3, 4, 1, 3]


def test_the_tangent_warms_up_and_stays():
    config = MethodConfig(tangent_warmup=8)
    assert [float(warmup_ratio(config, step)) for step in (0, 2, 8, 100)] == [0.0, 0.25, 1.0, 1.0]
    assert float(warmup_ratio(MethodConfig(tangent_warmup=0), 0)) == 1.0
