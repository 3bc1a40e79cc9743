"""A trace has the steps that were asked for, and none of the others."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from rcm_jax.errors import ArgumentError
from rcm_jax.training.profiling import Profile, parse_steps


def traced(folder) -> set[str]:
    """Names of what ran while a trace was taken."""
    (path,) = folder.rglob("*.trace.json.gz")
    return {event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


def loop(profile, start=0, stop=6):
    for step in range(start, stop):
        profile.before(step)
        with jax.profiler.TraceAnnotation(f"step {step} of the test"):
            out = {"loss": jnp.zeros(()) + step}
        profile.after(step, out)
    profile.close()


@pytest.mark.long
@pytest.mark.parametrize(
    ("start", "stop", "want"),
    [(0, 6, {2, 3}), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 6, {3}), (0, 3, {2})))],
    ids=["whole", "resumed within", "stopped"],
)
def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, start, stop, want):
    loop(Profile(parse_steps("2:4", 6), tmp_path / "profile"), start, stop)
    names = traced(tmp_path / "profile")
    assert {step for step in range(6) if f"step {step} of the test" in names} == want


@pytest.mark.parametrize("start", [4, 5])
def test_a_run_that_resumes_after_them_traces_nothing(tmp_path, start):
    loop(Profile(parse_steps("2:4", 6), tmp_path / "profile"), start)
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_fails_is_a_warning(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    with pytest.warns(UserWarning, match=r"no trace in .*profile \("):
        loop(Profile(parse_steps("2:4", 6), tmp_path / "profile"))


@pytest.mark.parametrize("text", ["13:10", "5:5", "10", "a:b", "", "-1:3", "1:2:3"])
def test_steps_that_are_none(text):
    with pytest.raises(ArgumentError, match="must be START:STOP, the first step to trace and the first that is not"):
        parse_steps(text, 100)


def test_steps_beyond_the_run():
    assert parse_steps("7:10", 10) == range(7, 10)
    with pytest.raises(ArgumentError, match="profile_steps=8:11 is beyond the run, which has steps=10"):
        parse_steps("8:11", 10)
