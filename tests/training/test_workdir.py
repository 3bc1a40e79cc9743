"""A workdir is one config's, and one job's at a time."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rcm_jax.training.lora import LoraConfig
from rcm_jax.training.workdir import open_workdir
from tests.tiny import tiny_run

HOLDS = """
    import sys, time
    sys.path.insert(0, {here!r})
    from rcm_jax.training.workdir import open_workdir
    from tests.tiny import tiny_run
    with open_workdir({workdir!r}, tiny_run()):
        print("held", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def other_job(tmp_path):
    """A job in another process that trains in tmp_path / "run"."""
    here = str(Path(__file__).parents[2])
    program = textwrap.dedent(HOLDS).format(here=here, workdir=str(tmp_path / "run"))
    environment = os.environ | {"PYTHONPATH": here, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_job_is_refused_until_the_first_is_gone(tmp_path, other_job):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for name in ("run", "link"):
        with (
            pytest.raises(RuntimeError, match=rf"{name} is in use: process {other_job.pid} on .* trains in it"),
            open_workdir(tmp_path / name, tiny_run()),
        ):
            pass
    other_job.kill()
    other_job.wait()
    with open_workdir(tmp_path / "link", tiny_run()) as workdir:
        assert str(os.getpid()) in (workdir / "lock").read_text()


def test_another_config_is_refused_and_changes_nothing(tmp_path):
    with open_workdir(tmp_path, tiny_run()):
        pass
    before = (tmp_path / "config.json").read_text()
    with (
        pytest.raises(ValueError, match=r"another config(.|\n)*optimizer.lr: 0.001 in the workdir, 0.5 now"),
        open_workdir(tmp_path, tiny_run(optimizer={"lr": 0.5})),
    ):
        pass
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize("changes", [{"steps": 99}, {"keep_every": 7}, {"mesh": {"fsdp": 2}}, {"stop_after": 3}])
def test_what_may_change(tmp_path, changes):
    for config in (tiny_run(), tiny_run(**changes)):
        with open_workdir(tmp_path, config):
            pass


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(OSError, match=r"cannot write to the workdir .*file/run"),
        open_workdir(tmp_path / "file" / "run", tiny_run()),
    ):
        pass


def test_settings_that_came_since_have_their_defaults(tmp_path):
    """A run goes on under a newer version; what the older one computed is what the defaults say."""
    with open_workdir(tmp_path, tiny_run()):
        pass
    file = tmp_path / "config.json"
    old = json.loads(file.read_text())
    del old["lora"], old["method"]["t_range"], old["data"]["shuffle"]
    file.write_text(json.dumps(old))
    with (
        pytest.raises(ValueError, match=r"another config\S*(.|\n)*lora.rank: 0 in the workdir, 2 now"),
        open_workdir(tmp_path, tiny_run(lora=LoraConfig(rank=2))),
    ):
        pass
    file.write_text(json.dumps(old | {"gone": 1}))
    with pytest.raises(ValueError, match="gone: 1 in the workdir, absent now"), open_workdir(tmp_path, tiny_run()):
        pass
    file.write_text(json.dumps(old))
    with open_workdir(tmp_path, tiny_run()):
        pass
