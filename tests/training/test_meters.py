"""Meters against a device whose times are known: it works off what it is given while the host goes on."""

import math
import time
import types

import jax
import pytest

from rcm_jax.parallel import make_mesh
from rcm_jax.training.flops import step_flops
from rcm_jax.training.meters import Meters, short
from rcm_jax.training.optimizer import learning_rate
from rcm_jax.training.schedule import step_name
from tests.tiny import tiny_run

SECONDS = {"student": 4.0, "student_dmd": 8.0, "critic": 2.0}
COMPILING, CALLING, SAVING = 100.0, 0.125, 50.0


class Machine:
    """A host and a device with one clock; `kind` is what the device calls itself."""

    platform, process_index = "gpu", 0

    def __init__(self, kind="NVIDIA H100 80GB HBM3"):
        self.now, self.free, self.device_kind, self.calls = 1000.0, 0.0, kind, set()

    def clock(self):
        return self.now

    def memory_stats(self):
        return {"bytes_in_use": 3 * 2**30, "peak_bytes_in_use": 5 * 2**30} if "H100" in self.device_kind else None

    def step(self, kind):
        """Returns before the device is done; the first of a kind compiles on the host."""
        self.now += CALLING if kind in self.calls else COMPILING
        self.calls.add(kind)
        self.free = max(self.free, self.now) + SECONDS[kind]
        return {"ends": self.free}

    def watch(self, metrics, clock):
        def result():
            self.now = max(self.now, metrics["ends"])
            return metrics["ends"]

        return types.SimpleNamespace(result=result)


def loop(machine, config, steps, data=0.0, save_at=()):
    """The run's records, one an interval of `log_every` steps."""
    meters, records = Meters(config, [machine, machine], machine.clock, machine.watch), []

    def batches():
        for step in range(steps):
            machine.now += data
            yield step

    for step in meters.timed(batches()):
        kind = step_name(config.method, step)
        meters.begin(kind)
        metrics = machine.step(kind)
        meters.end(step, kind, metrics)
        machine.now += SAVING * (step in save_at)
        if (step + 1) % config.log_every == 0:
            records.append(meters.read(step + 1))
    return records


def run(**changes):
    return tiny_run(method={"tangent_warmup": 3, "student_update_freq": 4}, **{"log_every": 8, "steps": 40} | changes)


def seconds(record):
    return {k.removeprefix("seconds_"): v for k, v in record.items() if k.startswith("seconds_")}


def test_each_kind_has_its_own_seconds_and_compiling_is_in_none():
    for record in loop(Machine(), run(), 40):
        first = record["step"] == 8
        assert seconds(record).keys() == {"student_dmd", "critic"} | ({"student"} if first else set())
        for kind, value in seconds(record).items():
            assert value == pytest.approx(SECONDS[kind], abs=CALLING)


def test_rates_are_of_all_time_but_compiling():
    config, machine = run(), Machine()
    record = loop(machine, config, 16)[1]
    kinds = [step_name(config.method, n) for n in range(8, 16)]
    spent = sum(SECONDS[kind] for kind in kinds) + CALLING  # the interval's first call found an idle device
    assert record["videos_per_second"] == pytest.approx(8 * 8 / spent)
    assert record["tokens_per_second"] == pytest.approx(8 * 8 * math.prod(config.model.grid((9, 6, 6))) / spent)
    work = sum(step_flops(config, n) for n in range(8, 16))
    assert record["mfu"] == pytest.approx(work / spent / (2 * 989e12))
    assert record["step_share"] == pytest.approx(1)
    assert record["data_wait_share"] == 0
    assert (record["memory_gib"], record["memory_peak_gib"]) == (3, 5)


def test_waiting_for_data_is_told_and_counts_against_the_rates_alone():
    quick, slow = (loop(Machine(), run(), 16, data=data)[1] for data in (0.0, 20.0))
    assert slow["data_wait_share"] > 0.8
    assert slow["videos_per_second"] < quick["videos_per_second"] / 4
    assert seconds(slow) == pytest.approx(seconds(quick), abs=CALLING)


def test_a_checkpoint_counts_against_the_rates_alone():
    plain, saving = (loop(Machine(), run(), 16, save_at=at)[1] for at in ((), (10,)))
    assert seconds(saving) == pytest.approx(seconds(plain), abs=CALLING)
    assert saving["videos_per_second"] < plain["videos_per_second"] / 2
    assert saving["step_share"] < 0.5 < plain["step_share"]


def test_an_interval_of_compiling_alone_has_no_rates():
    record = loop(Machine(), run(log_every=1), 1)[0]
    assert record["videos_per_second"] is record["mfu"] is record["data_wait_share"] is None
    assert seconds(record) == {}


def test_a_device_that_is_not_in_the_list_has_no_mfu_and_may_not_count_memory():
    record = loop(Machine("cpu"), run(), 16)[1]
    assert record["mfu"] is record["memory_gib"] is record["memory_peak_gib"] is None
    assert record["videos_per_second"] > 0
    assert short(record).keys() == {"student_dmd", "critic", "data", "lr", "lr_fake"}


def test_learning_rates_follow_the_updates_of_each_network():
    config = run(optimizer={"warmup_updates": 10}, log_every=1)
    o, records = config.optimizer, loop(Machine(), config, 9)
    # three of the warm-up, then a student step in four: 5 student and 4 critic updates
    assert records[-1]["lr"] == pytest.approx(float(learning_rate(o, o.lr)(5)))
    assert records[-1]["lr_fake"] == pytest.approx(float(learning_rate(o, o.lr_fake)(4)))
    alone = tiny_run(method={"dmd_scale": 0.0}, log_every=1)
    assert "lr_fake" not in loop(Machine(), alone, 2)[-1]


def test_a_host_may_ask_alone():
    """Under the run's mesh an eager sum is a program of all hosts: those that did not ask would be waited for."""
    config, seen = run(), []
    with jax.set_mesh(make_mesh(2, 4)):
        meters = Meters(config, jax.devices())
        schedule = meters._rates["lr"]
        meters._rates["lr"] = lambda count: seen.append(schedule(count)) or seen[0]
        meters.read(1)
    assert seen[0].sharding.device_set == {jax.local_devices()[0]}


def test_the_clock_of_the_wall_may_jump(monkeypatch):
    """Also the real thread that waits: an hour back and a day on, between the steps."""
    hours = iter([*(3600.0 * n * (-1) ** n for n in range(1000))])
    monkeypatch.setattr(time, "time", lambda: next(hours))
    meters = Meters(run(), jax.devices()[:1])
    for step in range(3):
        assert meters.begin("student") == (step == 0)
        meters.end(step, "student", {"loss": jax.numpy.full((), step)})
    record = meters.read(3)
    assert 0 < seconds(record)["student"] < record["elapsed"] < 600


def test_what_a_step_raised_is_raised_where_the_loop_waits():
    class Failed:
        def block_until_ready(self):
            raise RuntimeError("out of memory")

    meters = Meters(run(), jax.devices()[:1])
    meters.end(0, "student", {"loss": Failed()})
    with pytest.raises(RuntimeError, match="out of memory"):
        meters.end(1, "student", {"loss": Failed()})


def test_the_progress_line_is_short():
    line = short(loop(Machine(), run(), 16)[1])
    assert line["critic"].endswith("s")
    assert line["data"] == "0%"
    assert line["mem"] == "5G"
    assert line.keys() >= {"student_dmd", "critic", "mfu", "lr", "lr_fake"}
