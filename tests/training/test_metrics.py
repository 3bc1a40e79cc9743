"""Records survive kills, and neither TensorBoard nor wandb can end a run."""

import json
import os
import sys
import threading
import types
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.training import metrics
from rcm_jax.training.metrics import MetricsWriter, read_metrics, read_records

STEPS = [{"step": n, "kind": "student", "loss": n / 2} for n in range(4)]


def write(workdir, steps=range(4), start=0, **options):
    writer = MetricsWriter(workdir, start, **options)
    for step in steps:
        writer.add(step, "student", {"loss": jnp.asarray(step / 2)})
    assert writer.flush() == STEPS[steps[-1]]
    writer.close()


@pytest.mark.parametrize("torn", [b'{"step": 4, "ki', b'{"step": 4, "kind": "student", "loss": 2.0}', b"{\xff"])
def test_a_line_that_a_kill_tore_is_dropped_and_made_again(tmp_path, torn):
    """Also one that is whole but for its end: what is appended would stand on the same line."""
    write(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert read_metrics(tmp_path) == STEPS
    write(tmp_path, range(2, 4), start=2)
    assert read_metrics(tmp_path) == STEPS
    (tmp_path / "metrics.jsonl").write_text('{"step": 0\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1: .* is no record"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("moment", ["write_text", "replace"])
def test_a_kill_while_a_resume_rewrites_the_history_loses_none(tmp_path, monkeypatch, moment):
    write(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    owner = metrics.Path if moment == "write_text" else os
    monkeypatch.setattr(owner, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, 2)
    monkeypatch.undo()
    assert read_metrics(tmp_path) == STEPS


def test_one_process_writes(tmp_path):
    write(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    write(tmp_path, range(2, 4), start=2, process_index=1, tensorboard=True, wandb="toy")
    assert read_metrics(tmp_path) == STEPS
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_speed_is_a_file_of_its_own(tmp_path):
    write(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for start in (0, 2):  # nothing is taken back
        writer = MetricsWriter(tmp_path, 4)
        writer.speed({"step": start, "seconds": {"critic": 0.5}, "mfu": None})
        writer.close()
    assert [r["step"] for r in read_records(tmp_path / "speed.jsonl")] == [0, 2]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def board_scalars(folder) -> list[tuple[int, str, float]]:
    """What the event files of a folder hold, by their format: length, its checksum, event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_tensorboard_gets_every_step_and_the_speed(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=True)
    writer.add(0, "student", {"loss": np.float32(1.5)})
    writer.speed({"step": 1, "mfu": 0.25, "data_wait_share": None})
    writer.close()
    write(tmp_path, range(1, 2), start=1, tensorboard=True)  # within the same second
    scalars = board_scalars(tmp_path / "tensorboard")
    assert sorted(scalars) == [(0, "loss", 1.5), (1, "loss", 0.5), (1, "speed/mfu", 0.25)]


def test_tensorboard_that_cannot_be_opened_is_a_warning(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.warns(UserWarning, match="TensorBoard does not work .*the run goes on without"):
        write(tmp_path, tensorboard=True)
    assert read_metrics(tmp_path) == STEPS


def test_tensorboard_that_fails_in_the_middle_is_one_warning(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=True)
    events = writer._sinks["TensorBoard"]._writer._py_recordio_writer._writer
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, events.fileno())  # every write fails from here on
    os.close(full)
    with warnings.catch_warnings(record=True) as warned:
        for step in range(4):
            writer.add(step, "student", {"loss": jnp.asarray(step / 2)})
            writer.flush()
        writer.close()
    assert [str(w.message).split(" (")[0] for w in warned] == ["TensorBoard does not work"]
    assert read_metrics(tmp_path) == STEPS


class Client(types.ModuleType):
    """A wandb whose server fails at one of its calls."""

    def __init__(self, fails):
        super().__init__("wandb")
        self.fails, self.logged = fails, []

    def _call(self, name):
        if name == self.fails:
            raise ConnectionError(f"{name}: no route to host")

    def init(self, **_):
        self._call("init")
        return self

    def log(self, numbers, step):
        self._call("log")
        self.logged.append((step, numbers))

    def finish(self):
        self._call("finish")


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_wandb_that_fails_is_a_warning(tmp_path, monkeypatch, fails):
    client = Client(fails)
    monkeypatch.setitem(sys.modules, "wandb", client)
    with pytest.warns(UserWarning, match=f"wandb does not work .*{fails}: no route to host.*goes on without"):
        write(tmp_path, wandb="toy")
    assert read_metrics(tmp_path) == STEPS
    assert len(client.logged) == (4 if fails == "finish" else 0)


def test_wandb_that_does_not_answer_at_the_end_is_left(tmp_path, monkeypatch):
    client, answer = Client(""), threading.Event()
    client.finish = answer.wait
    monkeypatch.setitem(sys.modules, "wandb", client)
    monkeypatch.setattr(metrics, "PATIENCE", 0.05)
    with pytest.warns(UserWarning, match="TimeoutError: the last numbers were not sent within 0.05 seconds"):
        write(tmp_path, wandb="toy")
    answer.set()
    assert len(client.logged) == 4


def test_wandb_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match=r"wandb='toy' needs the extra: pip install 'rcm_jax\[wandb\]'"):
        MetricsWriter(tmp_path, 0, wandb="toy")


def test_a_full_disk_costs_the_speed_alone(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    (tmp_path / "speed.jsonl").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match=r"speed.jsonl: No space left"):
        writer.speed({"step": 1, "mfu": 0.5})
    assert json.dumps(read_metrics(tmp_path)) == "[]"
