"""Programs are kept between runs of a command: where, when not, and that they are taken."""

import subprocess
import sys
from pathlib import Path

import pytest

from rcm_jax.compilation import cache_folder

RUN = """
import jax
from rcm_jax.compilation import keep_programs
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((3, 3))).block_until_ready()
print(len(hits), jax.config.jax_compilation_cache_dir)
"""


def run(**environment):
    base = {"PATH": "/usr/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, env=base | environment)
    assert done.returncode == 0, done.stderr
    hits, folder = done.stdout.split()
    return int(hits), folder, done.stderr


def test_the_second_run_takes_what_the_first_compiled(tmp_path):
    for hits in (0, 1):
        found, folder, _ = run(RCM_JAX_CACHE=str(tmp_path / "programs"))
        assert Path(folder).parent == tmp_path / "programs"
        assert min(found, 1) == hits


@pytest.mark.long
def test_jaxs_own_setting_comes_first_and_a_bad_folder_is_said(tmp_path):
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"), HOME=str(tmp_path))[1] == str(tmp_path / "jax")
    (tmp_path / "file").write_text("in the way")
    _, folder, said = run(RCM_JAX_CACHE=str(tmp_path / "file"))
    assert folder == "None"
    assert "programs are not kept" in said
    assert "RCM_JAX_CACHE moves it" in said


@pytest.mark.parametrize(
    ("environment", "parent"),
    [
        ({"RCM_JAX_CACHE": "/big/disk"}, "/big/disk"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/rcm_jax"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/rcm_jax"),
        ({"RCM_JAX_CACHE": "off"}, None),
        ({"RCM_JAX_CACHE": "0"}, None),
    ],
)
def test_where_programs_are_kept(monkeypatch, environment, parent):
    monkeypatch.delenv("RCM_JAX_CACHE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder = cache_folder()
    assert (folder and str(folder.parent)) == parent
