"""How fast a run is: seconds a step by kind, videos and tokens a second, MFU, device memory, waiting for data.

Steps run while the host goes on, so a step's time is not that of its call. A thread waits for each step's end; the loop
waits too, but one step late, when the next is on its way: the device always has work and is never far behind. A step's
seconds are from its call, or the end of the step before it if that was later, to its end. The first step of a kind,
which compiles, is in no figure. Times are of the monotonic clock.
"""

import collections
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax

from rcm_jax.training.config import RunConfig
from rcm_jax.training.flops import peak, step_flops
from rcm_jax.training.optimizer import learning_rate
from rcm_jax.training.schedule import critic_updates, student_updates
from rcm_jax.types import Metrics

T = TypeVar("T")
Record = dict[str, int | float | None]

KINDS = ("student", "student_dmd", "critic", "diffusion")


class Ending(threading.Thread):
    """Waits for a step in a thread that does not keep the process alive; `result` is when it ended."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]):
        super().__init__(daemon=True, name="step ending")
        self._metrics, self._clock, self._error, self._at = metrics, clock, None, 0.0
        self.start()

    def run(self) -> None:
        try:
            jax.block_until_ready(self._metrics)
        except Exception as error:  # the loop's own, raised where it waits
            self._error = error
        self._at = self._clock()

    def result(self) -> float:
        self.join()
        if self._error is not None:
            raise self._error
        return self._at


class _Pending(NamedTuple):
    step: int
    kind: str
    began: float
    compiled: bool
    ending: Ending


class Meters:
    """A loop tells of its steps as it takes them:

    for batch in meters.timed(batches):
        meters.begin(kind)
        state, metrics = step(state, batch)
        meters.end(step, kind, metrics)
        …
        record = meters.read(step)        # once a log interval, on every host alike

    devices: those of the run, on all hosts. Each process counts its own waiting and its own devices' memory. watch: how
    the end of a step is waited for; it raises there what the step raised.
    """

    def __init__(
        self, config: RunConfig, devices: Sequence[jax.Device], clock: Callable[[], float] = time.monotonic,
        watch: Callable[[Metrics, Callable[[], float]], Ending] = Ending,
    ):  # fmt: skip
        self._config, self._clock, self._watch, self._began = config, clock, watch, clock()
        self._local = [d for d in devices if d.process_index == jax.process_index()]
        rate = peak(devices[0].device_kind)
        self._peak = None if rate is None else rate * len(devices)
        self._tokens = math.prod(config.model.grid(config.data.latent_shape))
        o = config.optimizer
        self._rates = {"lr": learning_rate(o, o.lr), "lr_fake": learning_rate(o, o.lr_fake)}
        self._here = jax.make_mesh((1,), ("here",), (jax.sharding.AxisType.Auto,), devices=jax.local_devices()[:1])
        self._compiled: set[str] = set()
        self._pending: _Pending | None = None
        self._ended = self._call = self._began
        self._start_interval()

    def _start_interval(self) -> None:
        self._since, self._waited, self._compiling, self._work, self._videos = self._clock(), 0.0, 0.0, 0.0, 0
        self._seconds: dict[str, list[float]] = collections.defaultdict(list)

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the time that each was waited for."""
        source = iter(batches)
        while True:
            began = self._clock()
            try:
                batch = next(source)
            except StopIteration:
                return
            self._waited += self._clock() - began
            yield batch

    def begin(self, kind: str) -> bool:
        """Just before the call of a step; gives whether it is the first of its kind, and compiles."""
        self._call = self._clock()
        return kind not in self._compiled

    def end(self, step: int, kind: str, metrics: Metrics) -> None:
        """Just after it, with what it returned; waits for the step before it."""
        pending = _Pending(step, kind, self._call, kind not in self._compiled, self._watch(metrics, self._clock))
        self._compiled.add(kind)
        self.settle()
        self._pending = pending

    def settle(self) -> None:
        """Waits for the step that is on its way, if there is one."""
        if self._pending is None:
            return
        step, kind, began, compiled, ending = self._pending
        self._pending = None
        now = ending.result()
        seconds, self._ended = now - max(began, self._ended), now
        if compiled:
            self._compiling += seconds
            return
        self._seconds[kind].append(seconds)
        self._work += step_flops(self._config, step)
        self._videos += self._config.data.batch_size

    def read(self, step: int) -> Record:
        """Of the interval since the last reading, `step` being the number of steps that are done:

        seconds_KIND: the mean of a step. videos_per_second, tokens_per_second, mfu: over all of the interval but
        compiling: waiting for data, checkpoints and previews count. data_wait_share: of the same time, that in which
        the loop waited for a batch; step_share: in which a step ran. mfu is None where the device's peak is not known,
        memory where the device does not count it (GiB of the fullest device of this host: now, and the most so far).
        All are None where every step compiled.
        """
        self.settle()
        spent = self._clock() - self._since - self._compiling
        busy = sum(sum(times) for times in self._seconds.values())
        per_second = 1 / spent if self._videos and spent > 0 else None

        def rate(amount: float) -> float | None:
            return None if per_second is None else amount * per_second

        record: Record = {
            "step": step, "elapsed": self._clock() - self._began,
            **{f"seconds_{kind}": sum(times) / len(times) for kind, times in self._seconds.items()},
            "videos_per_second": rate(self._videos), "tokens_per_second": rate(self._videos * self._tokens),
            "mfu": None if self._peak is None else rate(self._work / self._peak),
            "data_wait_share": rate(self._waited), "step_share": rate(busy),
        }  # fmt: skip
        record |= self._memory() | self._learning_rates(step)
        self._start_interval()
        return record

    def _memory(self) -> Record:
        counted = [stats for d in self._local if (stats := d.memory_stats())]
        now, most = (
            max((s[key] / 2**30 for s in counted if key in s), default=None)
            for key in ("bytes_in_use", "peak_bytes_in_use")
        )
        return {"memory_gib": now, "memory_peak_gib": most}

    def _learning_rates(self, step: int) -> Record:
        """Of the next update of each network."""
        method = self._config.method
        updates = {"lr": student_updates(method, step)}
        if method.uses_dmd:
            updates["lr_fake"] = critic_updates(method, step)
        with jax.set_mesh(self._here):  # on the run's, all hosts would have to ask at once
            return {name: float(self._rates[name](count)) for name, count in updates.items()}


def short(record: Record) -> dict[str, str]:
    """What of a record a progress line has room for."""
    seconds = {kind: f"{record[f'seconds_{kind}']:.3g}s" for kind in KINDS if f"seconds_{kind}" in record}
    shares = {"mfu": record["mfu"], "data": record["data_wait_share"]}
    words = {name: f"{value:.0%}" for name, value in shares.items() if value is not None}
    if record["memory_peak_gib"] is not None:
        words["mem"] = f"{record['memory_peak_gib']:.3g}G"
    return seconds | words | {name: f"{record[name]:.2g}" for name in ("lr", "lr_fake") if name in record}
