"""Prompts with times: how they are read, which chunk each begins at, and what is refused."""

import pytest

from rcm_jax.errors import ArgumentError
from rcm_jax.pipelines.prompt_times import check_cuts, first_chunks, read_timed_prompts
from rcm_jax.sampling.prompts import PromptSchedule

WAN = [0.0, *((4 * (3 * i) - 3) / 16 for i in range(1, 27))]  # c3-3 at 16 frames a second: 79 latent frames


def test_a_file_is_its_pairs(tmp_path):
    (tmp_path / "p.txt").write_text("0: a red fox in snow\n\n  12.5 :it says: 3:00\n13.:  done \n", "utf-8")
    pairs = [(0.0, "a red fox in snow"), (12.5, "it says: 3:00"), (13.0, "done")]
    assert read_timed_prompts(tmp_path / "p.txt") == read_timed_prompts(str(tmp_path / "p.txt")) == pairs
    assert read_timed_prompts([[0, " a red fox in snow"], (12.5, "it says: 3:00"), (13, "done")]) == pairs


def test_a_prompt_holds_from_the_first_chunk_that_begins_at_its_time_or_later():
    """The published switches: frames 40, 80, 120, 160 and 200 at chunks of 3 become 42, 81, 120, 162, 201."""
    begins = [float(3 * i) for i in range(80)]
    timed = [(float(t), "x") for t in (0, 40, 80, 120, 160, 200)]
    assert [3 * chunk for chunk in first_chunks(timed, begins, 240.0)] == [0, 42, 81, 120, 162, 201]
    assert first_chunks([(0.0, "x"), (WAN[5], "on time"), (WAN[5] + 0.01, "late")], WAN, 19.0) == (0, 5, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: a\n2: b\n1: c", "--prompts_file={path}: 1 s comes after 2 s; times must rise"),
        ("0: a\n2: b\n2: c", "2 s comes after 2 s; times must rise"),
        ("1: a\n2: b", "the first prompt is at 1 s; a video begins with one, at 0"),
        ("0: a\na red fox", "'a red fox' does not begin with its time in seconds, as in '12.5: it begins to snow'"),
        ("0: a\n-1: b", "'-1: b' does not begin with its time"),
        ("0: a\n1:30: b", "'1:30: b' does not begin with its time"),
        ("0: a\n2:", "the prompt at 2 s is empty"),
        (" \n", "--prompts_file={path} has no prompts"),
        (None, "--prompts_file={path} is not there: name a file"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "p.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArgumentError) as refused:
        read_timed_prompts(path)
    assert message.format(path=path) in refused.value.as_flags()
    assert "\n" not in refused.value.as_flags()


@pytest.mark.parametrize("given", [[], ["a", "b"], [(0, "a"), (float("nan"), "b")], [("x", "a")], [(0, None)]])
def test_pairs_that_are_refused(given):
    with pytest.raises(ArgumentError, match="prompts_file must be a file, or pairs of seconds and prompt"):
        read_timed_prompts(given)


@pytest.mark.parametrize(
    ("timed", "message"),
    [
        ([(0.0, "a"), (9.0, "b")], "prompts_file: 'b' is at 9 s; the video ends at 9 s"),
        ([(0.0, "a"), (7.5, "b")], "'b' is at 7.5 s; no chunk begins then or later: the last one does at 6 s"),
        ([(0.0, "a"), (3.5, "b"), (5.0, "c")], "'c' is at 5 s, and no chunk begins between that and the prompt before"),
    ],
)
def test_prompts_that_no_chunk_would_follow(timed, message):
    with pytest.raises(ArgumentError, match=message):
        first_chunks(timed, [0.0, 3.0, 6.0], 9.0)


def test_cuts_need_a_policy_that_makes_them():
    check_cuts(PromptSchedule((0, 2)), taken=False)
    check_cuts(PromptSchedule((0, 2), (2,)), taken=True)
    with pytest.raises(ArgumentError, match="prompt asks for a cut .#., which cache_policy infinity_rope makes"):
        check_cuts(PromptSchedule((0, 2), (2,)), taken=False)
