"""A run's steps in order: batches, the step that the schedule names, metrics, samples, checkpoints, resume.

Above it is `runs.py`, which opens files, calls `train` and writes the weights; below it `step.py`, what one step
computes. What a step computes depends on the config and the step alone, so a run that was killed and resumed gives the
same numbers as one that was not. On several hosts every process runs this loop, each with its part of the batches; what
decides how it goes on (metrics, the wish to stop) all of them know alike.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rcm_jax.data.source import Source, batches
from rcm_jax.errors import Interrupted
from rcm_jax.objectives.objective import BAD
from rcm_jax.parallel import batch_sharding, local_rows, make_mesh, place_batch, sharded_attention
from rcm_jax.progress import waiting
from rcm_jax.training.checkpoint import Checkpoints
from rcm_jax.training.config import RunConfig
from rcm_jax.training.guard import Guard, StoppedLearningError
from rcm_jax.training.hosts import Agreement, check_same, on_first
from rcm_jax.training.meters import Meters, short
from rcm_jax.training.metrics import MetricsWriter
from rcm_jax.training.profiling import Profile
from rcm_jax.training.resume import open_state, parse_resume
from rcm_jax.training.schedule import step_name
from rcm_jax.training.state import Start, TrainState, Weights
from rcm_jax.training.step import make_steps
from rcm_jax.training.workdir import as_json, differences, open_workdir
from rcm_jax.version import code_version

OnState = Callable[[int, TrainState], None]


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag while a run lasts. Outside the main thread signals are left alone."""

    def __enter__(self):
        self.asked = False
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)


def open_mesh(config: RunConfig, devices: list | None) -> Mesh:
    """The run's mesh. Raises ValueError where its devices do not divide a microbatch."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence, devices)
    check_batch(config, mesh.size)
    return mesh


def check_batch(config: RunConfig, devices: int) -> None:
    """Raises ValueError where so many devices do not divide a microbatch."""
    samples = devices // config.mesh.sequence
    if (config.data.batch_size // config.microbatches) % samples:
        raise ValueError(
            f"data.batch_size={config.data.batch_size} in microbatches={config.microbatches} must be "
            f"divisible by the {samples} devices of (data, fsdp)"
        )


def train(
    config: RunConfig,
    source: Source,
    workdir: str | Path | None = None,
    *,
    weights: Start | None = None,
    devices: list | None = None,
    on_samples: OnState | None = None,
    on_weights: OnState | None = None,
    resume: str | int = "auto",
    profile_steps: range | None = None,
    about: dict[str, Any] | None = None,
    progress: str = "train",
) -> TrainState:
    """Trains to `config.steps` and returns the last state.

    workdir: metrics and checkpoints go here; None keeps nothing on disk.
    on_samples: called as (step, state) every `config.sample_every` steps and at the end, on every host.
    on_weights: the same every `config.weights_every` steps, but for the last.
    resume: "auto" goes on from the newest checkpoint, if there is one; a step from that one, and what is newer is set
        aside; "no" wants a workdir without any.
    profile_steps: these are traced, into the workdir.
    about: JSON that checkpoints carry besides step, config and code.
    Raises Interrupted after SIGTERM or SIGINT, with the state saved; StoppedLearningError as `config.stop_after` says,
    with a report; ValueError where the workdir is another run's or its checkpoints are of other data, or hosts
    disagree; RuntimeError where another job trains in it; DamagedError for a checkpoint whose numbers are not those
    saved.
    """
    parse_resume(resume)
    check_same(differences, as_json(config) | {"shards": dict(source.about)}, code_version())
    mesh = open_mesh(config, devices)
    with contextlib.ExitStack() as stack:
        if workdir is not None:
            with on_first("workdir") as mine:
                workdir = stack.enter_context(open_workdir(workdir, config)) if mine else Path(workdir).absolute()
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = None
        if workdir is not None:
            checkpoints = Checkpoints(workdir, mesh, config.keep, config.keep_every)
            stack.callback(checkpoints.close)
        weights = weights or Weights()
        with waiting(progress and f"{progress}: preparing the state"):
            state = open_state(config, weights, mesh, checkpoints, resume, source.about)
        run = _Run(config, source, mesh, workdir, checkpoints, about or {}, progress)
        return run.steps(state, weights, on_samples, on_weights, profile_steps)


class _Run:
    """What a run keeps beside its state."""

    def __init__(
        self, config: RunConfig, source: Source, mesh: Mesh, workdir: Path | None, checkpoints: Checkpoints | None,
        about: dict[str, Any], progress: str,
    ):  # fmt: skip
        self.config, self.source, self.mesh, self.workdir = config, source, mesh, workdir
        self.checkpoints, self.progress = checkpoints, progress
        self.about = about | {"config": as_json(config), "code": code_version()}
        self.first = jax.process_index() == 0
        self.writer: MetricsWriter | None = None
        self.guard = Guard(config.stop_after, source.keys)
        self.meters = Meters(config, list(mesh.devices.flat))
        self.pending: list[tuple[int, str, dict]] = []

    def steps(
        self, state: TrainState, weights: Start, on_samples: OnState | None, on_weights: OnState | None,
        profile_steps: range | None,
    ) -> TrainState:  # fmt: skip
        config, start = self.config, int(state.step)
        networks = weights.networks(config, self.mesh)
        steps = make_steps(config, jnp.asarray(self.source.null_text), sharded_attention(self.mesh))
        if self.workdir is not None and self.first:
            self.writer = MetricsWriter(self.workdir, start, tensorboard=config.tensorboard, wandb=config.wandb)
        profile = Profile(profile_steps or range(0), (self.workdir or Path()) / "profile")
        agreed, stopping = Agreement(self.mesh), False
        shown = bool(self.progress) and self.first
        bar = tqdm(total=config.steps, initial=start, desc=self.progress, unit="step", disable=not shown)
        with StopSignal() as stop, bar, contextlib.closing(self), contextlib.closing(profile):
            for step, batch in self.meters.timed(self._batches(start)):
                name = step_name(config.method, step)
                profile.before(step)
                new = self.meters.begin(name) and shown
                with waiting(f"{self.progress}: compiling the {name} step" if new else ""):
                    state, metrics = steps[name](state, networks, batch)
                self.meters.end(step, name, metrics)
                profile.after(step, metrics)
                self.pending.append((step, name, metrics))
                bar.update()
                done, last = step + 1, step + 1 == config.steps
                stopping = agreed(stop.asked) and not last
                if done % config.log_every == 0 or last or stopping:
                    bar.set_postfix(self._flush(state, done))
                if on_samples and config.sample_every and (done % config.sample_every == 0 or last):
                    on_samples(done, state)
                if on_weights and config.weights_every and done % config.weights_every == 0 and not last:
                    on_weights(done, state)
                if self.checkpoints and (done % config.checkpoint_every == 0 or last or stopping):
                    self.checkpoints.save(done, state, self._about(done))
                if stopping:
                    break
        if stopping:
            raise Interrupted(done, self.workdir)
        return state

    def _batches(self, start: int) -> Iterator[tuple[int, Any]]:
        """Batches on the mesh; each process reads the samples of its own devices."""
        stop, sharding = self.config.steps, batch_sharding(self.mesh)
        rows = local_rows(sharding, self.config.data.batch_size)
        for step, batch in zip(range(start, stop), batches(self.source, start, stop, rows), strict=True):
            yield step, place_batch(batch, sharding, rows, self.config.data.batch_size)

    def _about(self, step: int) -> dict[str, Any]:
        return self.about | {"data": {"position": step * self.config.data.batch_size, **self.source.about}}

    def _flush(self, state: TrainState, done: int) -> dict[str, str]:
        """Writes what is waiting, and ends a run that learns nothing; the newest losses, and how fast it goes."""
        record: dict[str, np.ndarray] = {}
        trouble = None
        for step, name, metrics in jax.device_get(self.pending):
            record = {key: value for key, value in metrics.items() if not key.startswith(BAD)}
            if self.writer:
                self.writer.add(step, name, record)
            try:
                if not trouble:
                    self.guard.check(step, name, metrics)
            except StoppedLearningError as error:
                trouble = error
        self.pending.clear()
        speed = self.meters.read(done)
        if self.writer:
            self.writer.flush()
            self.writer.speed(speed)
        if trouble:
            self._stop(trouble, state, done)
        if self.checkpoints:
            self.checkpoints.check()
        return {key: f"{value:.3g}" for key, value in record.items() if key.startswith("loss")} | short(speed)

    def _stop(self, trouble: StoppedLearningError, state: TrainState, done: int) -> None:
        """Saves the state, which the updates left out have not touched, and leaves a report."""
        if self.checkpoints is None:
            raise trouble
        self.checkpoints.save(done, state, self._about(done))
        report = self.guard.report(self.workdir) if self.first else self.workdir
        raise StoppedLearningError(f"{trouble}; {report} has the samples; saved before step {done}") from trouble

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        if self.checkpoints:
            self.checkpoints.wait()
