"""Flags that XLA takes, and what is said of those that it does not: it would end the process."""

import os

import pytest

from rcm_jax import plan, xla_flags
from rcm_jax.errors import ArgumentError
from tests.test_entry_points import fails, train


def test_sets_and_flags_in_full_reach_the_environment_before_what_is_there(monkeypatch):
    """The last of two equal flags wins, so that a user's own do."""
    monkeypatch.setattr(xla_flags, "_try", lambda *_: None)
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_mine=1")
    for given in ("none", ""):
        xla_flags.apply(given)
        assert os.environ["XLA_FLAGS"] == "--xla_of_mine=1"
    xla_flags.apply("--xla_a=1 --xla_b")
    assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_b --xla_of_mine=1"
    monkeypatch.delenv("XLA_FLAGS")
    xla_flags.apply("overlap")
    assert os.environ["XLA_FLAGS"] == xla_flags.SETS["overlap"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("fast", "must be one of none, overlap, or flags of XLA .*which 'fast' is not"),
        ("--xla_gpu_a=1 -v", "which '-v' is not"),
        ("--xla_gpu_no_such=1", "it does not know --xla_gpu_no_such=1"),
        ("--xla_gpu_all_gather_combine_threshold_bytes=many", "a value is not one of its flag"),
    ],
)
def test_what_xla_does_not_take_is_one_line(given, words):
    with pytest.raises(ArgumentError, match=words):
        xla_flags.resolve(given)


@pytest.mark.parametrize("name", xla_flags.SETS)
def test_the_installed_xla_takes_every_set(name):
    assert xla_flags.resolve(name) == xla_flags.SETS[name]


def test_the_command_refuses_before_it_makes_a_workdir(tmp_path):
    argv = ["--config=toy_rcm", f"--workdir={tmp_path}/run"]
    fails(train.main, [*argv, "--xla_flags=fast"], "--xla_flags=fast must be one of")
    fails(plan.main, ["--config=toy_rcm", "--gpu=h100", "--xla_flags=fast"], "--xla_flags=fast must be one of")
    fails(train.main, [*argv, "--profile_steps=3:3"], "--profile_steps=3:3 must be START:STOP")
    fails(
        train.main, [*argv, "--profile_steps=899:901"], "--profile_steps=899:901 is beyond the run, which has steps=900"
    )
    assert not (tmp_path / "run").exists()
