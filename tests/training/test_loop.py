"""A run that stops and resumes gives the numbers of one that does not."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rcm_jax.errors import ArgumentError, Interrupted
from rcm_jax.model_file import load_model
from rcm_jax.training.checkpoint import DamagedError
from rcm_jax.training.loop import train
from rcm_jax.training.metrics import read_metrics
from rcm_jax.training.state import Weights
from rcm_jax.wan.networks import init_params
from tests.tiny import MODEL, RandomSource, tiny_run

DEVICE = jax.devices()[:1]


@pytest.fixture(scope="module")
def teacher():
    return init_params(MODEL, jax.random.key(7))


class Watched(RandomSource):
    """Remembers which batches were asked for, and asks the run to stop after one of them."""

    def __init__(self, config, stop_at=None):
        super().__init__(config)
        self.stop_at, self.asked = stop_at, []

    def batch(self, step, rows=None):
        self.asked.append(step)
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(step, rows)


def run(config, workdir, teacher, source=None, **options):
    weights = Weights(teacher=teacher)
    return train(
        config, source or RandomSource(config), workdir, weights=weights, devices=DEVICE, progress="", **options
    )


@pytest.mark.parametrize(
    ("stop_at", "frozen"),
    [
        pytest.param(1, (), marks=pytest.mark.slow),
        pytest.param(4, ("time_in", "time_projection"), marks=pytest.mark.long),
    ],  # in the warm-up; between two critic steps
)
def test_resume_is_exact(tmp_path, teacher, stop_at, frozen):
    config = tiny_run(steps=8, optimizer={"frozen": frozen})
    whole = run(config, tmp_path / "whole", teacher)
    source = Watched(config, stop_at)
    with pytest.raises(Interrupted) as stopped:
        run(config, tmp_path / "cut", teacher, source)
    assert 0 < stopped.value.step < 8
    again = Watched(config)
    resumed = run(config, tmp_path / "cut", teacher, again)
    assert min(again.asked) == stopped.value.step
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    records = [read_metrics(tmp_path / name) for name in ("whole", "cut")]
    assert records[0] == records[1]
    assert [r["step"] for r in records[0]] == list(range(8))


@pytest.mark.long
def test_a_finished_run_is_left_as_it_is(tmp_path, teacher):
    config = tiny_run(steps=3)
    first = run(config, tmp_path, teacher)
    again = run(config, tmp_path, teacher)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    longer = run(dataclasses.replace(config, steps=4), tmp_path, teacher)
    assert longer.step == 4


@pytest.mark.slow
def test_five_resumes_under_another_name_and_a_clock_that_jumps(tmp_path, teacher, monkeypatch):
    """Stopped in every phase of the schedule; the workdir is now a folder, now a link to it; between and in the runs
    the clock goes forward by years, and back."""
    config = tiny_run(steps=9)
    whole = run(config, tmp_path / "whole", teacher)
    (tmp_path / "link").symlink_to(tmp_path / "cut")
    clock, years = time.time, 365 * 24 * 3600

    class Jumping(Watched):
        def batch(self, step, rows=None):
            monkeypatch.setattr(time, "time", lambda: clock() + years * (-1) ** step * step)
            return super().batch(step, rows)

    reached = []
    for i in range(20):
        try:
            resumed = run(config, tmp_path / ("link" if i % 2 else "cut"), teacher, Jumping(config, 2 * i))
            break
        except Interrupted as stopped:
            reached.append(stopped.step)
    assert len(reached) >= 3
    assert reached == sorted(set(reached))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "cut")


@pytest.mark.long
def test_a_damaged_checkpoint_ends_the_run_and_an_older_one_is_taken_when_asked(tmp_path, teacher):
    config = tiny_run(steps=6, checkpoint_every=2)
    whole = run(config, tmp_path, teacher)
    newest = tmp_path / "checkpoints" / "6" / "state"
    for file in [*newest.rglob("d/*")]:
        file.write_bytes(file.read_bytes()[:1000])
    before = read_metrics(tmp_path)
    with pytest.raises(DamagedError, match=rf"{newest}.* is damaged: .*; step 4 is whole: --resume=4 goes on from it"):
        run(config, tmp_path, teacher)
    assert read_metrics(tmp_path) == before
    with pytest.raises(ArgumentError, match="there is no such checkpoint; the workdir has 2, 4, 6"):
        run(config, tmp_path, teacher, resume=3)
    with pytest.raises(ArgumentError, match="has checkpoints up to step 6; use a new workdir"):
        run(config, tmp_path, teacher, resume="no")
    with pytest.warns(UserWarning, match=r"beyond step 4 was moved to .*set_aside/6"):
        again = run(config, tmp_path, teacher, resume=4)
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_batches_that_do_not_divide_over_the_devices(teacher):
    config = tiny_run(microbatches=4)
    with pytest.raises(ValueError, match=r"batch_size=8 in microbatches=4 must be divisible by the 8 devices"):
        train(config, RandomSource(config), weights=Weights(teacher=teacher), progress="")


@pytest.mark.slow
def test_sigterm_to_the_command_saves_and_resumes(tmp_path):
    """The command itself: killed by SIGTERM it exits with 143, and resumed it ends with the uninterrupted weights."""
    common = [sys.executable, "-m", "rcm_jax.train", "--config=configs/toy_rcm.py", "--config.steps=24",
              "--config.data.batch_size=4", "--config.method.tangent_warmup=4",
              "--config.tensorboard=False"]  # fmt: skip
    one_device = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # the tests' own process has eight
    subprocess.run([*common, f"--workdir={tmp_path}/whole"], check=True, timeout=600, env=one_device)
    process = subprocess.Popen([*common, f"--workdir={tmp_path}/cut"], env=one_device)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 10:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    subprocess.run([*common, f"--workdir={tmp_path}/cut"], check=True, timeout=600, env=one_device)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "cut")
    # not the files' bytes: safetensors writes the two entries of its metadata in an order of chance
    (whole, info), (cut, same) = (load_model(tmp_path / name / "student.safetensors") for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    assert info == same
