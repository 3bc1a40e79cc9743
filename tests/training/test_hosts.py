"""Runs of two processes with four devices each, as of two hosts: one numbers, one stop, one end."""

import json
import signal
import time

import jax
import numpy as np
import pytest

from rcm_jax.errors import ArgumentError
from rcm_jax.model_file import ModelInfo, load_model, save_model
from rcm_jax.training import hosts
from rcm_jax.training.host_options import HostOptions
from rcm_jax.training.hosts import GONE, join_hosts
from rcm_jax.training.metrics import read_metrics
from tests.hosts import finish, free_port, said, start
from tests.tiny import MODEL, perturbed_params

SCM = ("--config.method.dmd_scale=0", "--config.microbatches=2", "--config.data.batch_size=16")
MESHES = {
    "fsdp": ("--config.mesh.fsdp=8",),
    "sequence": ("--config.mesh.fsdp=4", "--config.mesh.sequence=2"),
    "hybrid": ("--config.mesh.data=2", "--config.mesh.fsdp=4"),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    return save_model(path, perturbed_params(MODEL, 7), ModelInfo(MODEL, "teacher", "toy", (9, 6, 6)))


def done(processes, workdir):
    codes = finish(processes)
    return codes, [said(workdir, i).read_text().strip().splitlines()[-1] for i in range(len(codes))]


def when(condition, processes, patience=300):
    end = time.monotonic() + patience
    while not condition():
        assert all(p.poll() is None for p in processes), "a process ended early"
        assert time.monotonic() < end
        time.sleep(0.05)


def assert_close(one, other):
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value == b[key] if isinstance(value, str) else value == pytest.approx(b[key], rel=2e-4), key


@pytest.mark.slow
def test_two_hosts_are_one_and_stop_and_go_on_together(tmp_path, teacher):
    """Against one process with as many devices; SIGTERM to one host of the two saves both at one step; the run ends on
    one host, and on another mesh."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert done(start(teacher, one, *SCM, *MESHES["fsdp"], "--config.steps=16"), one)[0] == [0]

    processes = start(teacher, two, *SCM, *MESHES["hybrid"], "--config.steps=16", "--config.log_every=1", hosts=2)
    when(lambda: len(read_metrics(two)) > 4, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, words = done(processes, two)
    assert codes == [143, 143]
    assert words[0] == words[1]
    assert "stopped by a signal; saved before step" in words[0]
    stopped = len(read_metrics(two))
    assert 4 < stopped < 16
    about = json.loads((two / "checkpoints" / str(stopped) / "about" / "metadata").read_text())
    assert about["data"] == {"position": 16 * stopped}

    resumed = start(teacher, two, *SCM, *MESHES["sequence"], "--config.steps=16")
    assert done(resumed, two)[0] == [0]
    assert_close(one, two)
    got, want = (load_model(path / "student.safetensors")[0] for path in (two, one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, want)


@pytest.mark.slow
def test_when_a_host_is_gone_the_others_end(tmp_path, teacher):
    flags = (*SCM, *MESHES["fsdp"], "--config.steps=100000", "--config.log_every=1", "--host_lost_after=4")
    processes = start(teacher, tmp_path / "run", *flags, hosts=2)
    when(lambda: len(read_metrics(tmp_path / "run")) > 2, processes)
    processes[1].kill()
    began = time.monotonic()
    codes, words = done(processes, tmp_path / "run")
    assert time.monotonic() - began < 60
    assert codes == [GONE, -9]
    assert "error: host 1 (" in words[0]
    assert "has not been heard of for 4 seconds; host 0 ends too, and" in words[0]


@pytest.mark.slow
def test_hosts_with_different_configs_end_before_anything_is_compiled(tmp_path, teacher):
    port = free_port()
    both = [start(teacher, tmp_path / "run", *SCM, f"--config.seed={i}", f"--coordinator=127.0.0.1:{port}",
                  "--num_hosts=2", f"--host={i}", devices=4, name=f"host{i}")[0] for i in range(2)]  # fmt: skip
    assert finish(both) == [1, 1]
    for i in range(2):
        line = said(tmp_path / f"host{i}").read_text().strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert "has another config than host 0" in line
        assert "seed: 1 on host 1, 0 on host 0" in line
    assert not (tmp_path / "run").exists()


def test_other_code_is_named(monkeypatch):
    def another(text):
        return [text, json.dumps(json.loads(text) | {"code": "0.1.0+other", "name": "node2"})]

    monkeypatch.setattr(hosts, "exchange", another)
    with pytest.raises(ValueError, match=r"host 1 \(node2\) runs other code, 0.1.0\+other, than host 0 .*0.1.0\+this"):
        hosts.check_same(lambda *_: [], {}, "0.1.0+this")


def test_a_coordinator_that_does_not_answer_is_named():
    port = free_port()
    options = HostOptions(coordinator=f"127.0.0.1:{port}", num_hosts=2, host=1, host_timeout=1)
    with pytest.raises(RuntimeError, match=rf"coordinator at 127.0.0.1:{port} does not answer after host_timeout=1 "):
        join_hosts(options)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"coordinator": "a:1"}, "num_hosts is missing"),
        ({"coordinator": "a:1", "num_hosts": 2, "host": 2}, "host=2 must be 0 to 1"),
        ({"coordinator": "a", "num_hosts": 2, "host": 0}, "coordinator=a must be HOST:PORT"),
        ({"coordinator": "a:1", "num_hosts": 2, "host": 0, "hosts": "slurm"}, "leave coordinator=a:1 out"),
        ({"hosts": "lsf"}, "hosts=lsf must be one of slurm, mpi, k8s"),
    ],
)
def test_flags_that_do_not_go_together(given, words):
    with pytest.raises(ArgumentError, match=words):
        HostOptions(**given)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 3),
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": "4,5"}, 2),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, None),
    ],
)
def test_a_process_that_is_alone_on_its_host_has_all_its_gpus(tmp_path, monkeypatch, environment, count):
    for name in ("0000:1", "0000:2", "0000:3"):
        (tmp_path / name).mkdir()
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_GPUS_ON_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._all_of_this_host(tmp_path) == (None if count is None else list(range(count)))
