"""Flags that XLA takes, and what is said of those that it does not: it would end the process."""

import os
import subprocess
import sys
from types import SimpleNamespace

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


@pytest.fixture
def children(monkeypatch, tmp_path):
    """A cache of its own, and what children are asked; they take no flag with "no_such" in it."""
    asked = []

    def child(flags):
        asked.append(flags)
        return SimpleNamespace(returncode=int("no_such" in flags))

    monkeypatch.setattr(xla_flags, "_child", child)
    monkeypatch.setenv("RCM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_mine=1")
    return asked


ALL = " ".join(xla_flags.ON_CPUS)


def test_cpus_have_their_flags_and_xla_is_asked_once(children, monkeypatch):
    for _ in range(2):
        monkeypatch.setenv("XLA_FLAGS", "--xla_of_mine=1")
        xla_flags.suit_cpus()
        assert os.environ["XLA_FLAGS"] == f"{ALL} --xla_of_mine=1"
    assert children == [ALL]
    monkeypatch.setattr(xla_flags, "ON_CPUS", ("--xla_cpu_no_such=1",))  # another flag is another question
    for _ in range(2):
        monkeypatch.setenv("XLA_FLAGS", "")
        xla_flags.suit_cpus()
        assert os.environ["XLA_FLAGS"] == ""
    assert children[1:] == ["--xla_cpu_no_such=1"]


def test_a_cache_that_cannot_be_written_is_no_error(children, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    xla_flags.suit_cpus()
    assert os.environ["XLA_FLAGS"].startswith(ALL)


@pytest.mark.parametrize(
    ("platforms", "flags"),
    [("cpu", ALL.replace("individual_dot", "invalid")), ("cuda,cpu", ""), ("cuda", "")],
)
def test_what_the_user_has_set_and_other_devices_stay(children, monkeypatch, platforms, flags):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("XLA_FLAGS", flags)
    xla_flags.suit_cpus()
    assert os.environ["XLA_FLAGS"] == flags
    assert children == []


def test_what_the_user_has_not_set_is_added(children, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    xla_flags.suit_cpus()
    assert os.environ["XLA_FLAGS"] == f"{xla_flags.ON_CPUS[0]} --xla_backend_optimization_level=3"


@pytest.mark.parametrize("plugin", [None, "of a GPU"])
def test_where_nothing_is_said_a_plugin_of_another_device_tells(children, monkeypatch, plugin):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(xla_flags.importlib.util, "find_spec", lambda name: plugin)
    xla_flags.suit_cpus()
    assert (ALL in os.environ["XLA_FLAGS"]) == (plugin is None)


def test_the_installed_xla_takes_what_suits_cpus():
    """Where it does not, this says so: another flag is to be found, or none is needed."""
    assert xla_flags._child(ALL).returncode == 0


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


@pytest.mark.parametrize(
    ("said", "devices"),
    [({}, 2), ({"JAX_NUM_CPU_DEVICES": "3"}, 3), ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4)],
)
def test_cpus_are_shared_by_two_devices_unless_the_user_says_how_many(said, devices):
    script = "from rcm_jax.xla_flags import share_cpus; share_cpus(); import jax; print(jax.device_count())"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | said
    told = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert int(told.stdout) == (devices if os.cpu_count() > 1 or said else 1)
