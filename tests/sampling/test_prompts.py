"""Which text a chunk follows: at once, blended, cut, and after somebody spoke."""

import numpy as np
import pytest

from rcm_jax.sampling.prompts import Cut, PromptSchedule, Script

A, B, C = (np.full((2, 3, 4), value, np.float32) for value in (1.0, 5.0, -3.0))


@pytest.mark.parametrize(
    ("schedule", "last_share"),
    [
        (PromptSchedule(), [1, 1, 1, 1]),
        (PromptSchedule((0, 2)), [0, 0, 1, 1, 1]),
        (PromptSchedule((0, 2), blend=4), [0, 0, 0.25, 0.5, 0.75, 1, 1]),
        (PromptSchedule((0, 1), blend=2), [0, 0.5, 1, 1]),
        (PromptSchedule((0, 2), cuts=(2,), blend=4), [0, 0, 1, 1]),
    ],
)
def test_shares_of_the_last_prompt(schedule, last_share):
    weights = [schedule.weights(chunk) for chunk in range(len(last_share))]
    assert [w[-1] for w in weights] == last_share
    assert all(sum(w) == 1 for w in weights)
    changed = [i for i in range(1, len(last_share)) if last_share[i] != last_share[i - 1]]
    assert [i for i in range(len(last_share)) if schedule.changes(i)] == changed


def test_a_change_within_a_blend_goes_on_from_the_mixture():
    schedule = PromptSchedule((0, 1, 3), blend=4)
    assert schedule.weights(2) == (0.5, 0.5, 0)
    assert schedule.weights(3) == (0.375, 0.375, 0.25)
    assert schedule.weights(6) == (0, 0, 1)
    assert not schedule.changes(7)


def test_features_are_the_prompts_own_and_linear_between():
    script = Script((A, B), PromptSchedule((0, 1), blend=2))
    assert script.at(0) is A
    np.testing.assert_array_equal(script.at(1), np.full_like(A, 3.0))
    assert script.at(2) is B
    assert script.change(0) is None
    assert script.change(2) is B
    assert script.change(3) is None
    low = Script(tuple(x.astype("bfloat16") for x in (A, B)), script.schedule)
    assert low.at(1).dtype == low.at(0).dtype  # so that no other program is compiled for a mixture


def test_what_is_sent_takes_the_place_of_what_was_planned():
    script = Script((A, B, C), PromptSchedule((0, 2, 5), blend=2)).sent(3, C)
    assert script.at(2)[0, 0, 0] == 3.0  # as it was
    assert script.at(3)[0, 0, 0] == 0.0  # from the mixture, half of the way
    assert script.at(4) is script.at(9) is C
    assert script.sent(0, B).at(0) is B
    assert script.sent(3, Cut(C)).at(3) is C  # a cut is at once


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptSchedule((1, 2)), "the first must be 0"),
        (lambda: PromptSchedule((0, 2, 2)), "they must rise"),
        (lambda: PromptSchedule(()), "the first must be 0"),
        (lambda: PromptSchedule(blend=0), "blend=0 must be at least 1 chunk"),
        (lambda: Script((A, B)), "2 prompts for 1 starts"),
    ],
)
def test_schedules_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
