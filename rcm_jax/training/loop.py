"""A run's steps in order: batches, the step that the schedule names, metrics, samples, checkpoints, resume.

Above it is `runs.py`, which opens files, calls `train` and writes the weights; below it `step.py`, what one step
computes. What a step computes depends on the config and the step alone, so a run that was killed and resumed gives the
same numbers as one that was not. On several hosts every process runs this loop, each with its part of the batches; what
decides how it goes on (metrics, the wish to stop) all of them know alike.
"""

import contextlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rcm_jax.data.source import Source, batches
from rcm_jax.errors import ArgumentError, Interrupted
from rcm_jax.objectives.objective import BAD
from rcm_jax.parallel import batch_sharding, local_rows, make_mesh, place_batch, sharded_attention, state_shardings
from rcm_jax.progress import waiting
from rcm_jax.training.checkpoint import Checkpoints, DamagedError, abstract_like
from rcm_jax.training.config import RunConfig
from rcm_jax.training.guard import Guard, StoppedLearningError
from rcm_jax.training.hosts import Agreement, check_same, on_first
from rcm_jax.training.metrics import MetricsWriter
from rcm_jax.training.schedule import step_name
from rcm_jax.training.state import TrainState, Weights, abstract_state, first_state
from rcm_jax.training.step import make_steps
from rcm_jax.training.workdir import as_json, differences, open_workdir
from rcm_jax.version import code_version

OnSamples = Callable[[int, TrainState], None]


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


# --- where a run begins ----------------------------------------------------------------------------------------------


def parse_resume(resume: str | int) -> str | int:
    """ "auto", "no" or a step. Raises ArgumentError for anything else."""
    if resume in ("auto", "no"):
        return resume
    if not str(resume).isdigit():
        raise ArgumentError("{resume} must be auto, no, or the step of a checkpoint", resume=resume)
    return int(resume)


def open_state(
    config: RunConfig, weights: Weights, mesh: Mesh, checkpoints: Checkpoints | None, resume: str | int = "auto"
) -> TrainState:
    """The state that a run goes on from, sharded over the mesh: the newest checkpoint's, or that of step `resume`, or
    the first one.

    Raises DamagedError that names the newest checkpoint that is whole; ArgumentError for a step that is not there, and
    for resume "no" where there are checkpoints.
    """
    steps, resume = checkpoints.steps() if checkpoints else [], parse_resume(resume)
    if resume == "no" and steps:
        raise ArgumentError(
            f"{{resume}}: {checkpoints.folder} has checkpoints up to step {steps[-1]}; use a new workdir", resume=resume
        )
    if isinstance(resume, int) and resume not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ArgumentError(f"{{resume}}: there is no such checkpoint; the workdir has {there}", resume=resume)
    if not steps:
        return first_state(config, weights, mesh)
    like = abstract_like(abstract_state(config), state_shardings(mesh, abstract_state(config)))
    step = resume if isinstance(resume, int) else steps[-1]
    try:
        state, about = checkpoints.restore(step, like)
    except DamagedError as error:
        whole = checkpoints.whole_before(step, like)
        way = "no older one is whole" if whole is None else f"step {whole} is whole: --resume={whole} goes on from it"
        raise DamagedError(f"{error}; {way}") from error
    if about["code"] != code_version():
        warnings.warn(f"step {step} was saved by other code, {about['code']}; this is {code_version()}", stacklevel=2)
    for place in checkpoints.set_aside(after=step):
        warnings.warn(f"a checkpoint beyond step {step} was moved to {place}", stacklevel=2)
    return state


# --- the run ---------------------------------------------------------------------------------------------------------


def train(
    config: RunConfig,
    source: Source,
    workdir: str | Path | None = None,
    *,
    weights: Weights | None = None,
    devices: list | None = None,
    on_samples: OnSamples | None = None,
    resume: str | int = "auto",
    about: dict[str, Any] | None = None,
    progress: str = "train",
) -> TrainState:
    """Trains to `config.steps` and returns the last state.

    workdir: metrics and checkpoints go here; None keeps nothing on disk.
    on_samples: called as (step, state) every `config.sample_every` steps, on every host.
    resume: "auto" goes on from the newest checkpoint, if there is one; a step from that one, and what is newer is set
        aside; "no" wants a workdir without any.
    about: JSON that checkpoints carry besides step, config and code.
    Raises Interrupted after SIGTERM or SIGINT, with the state saved; StoppedLearningError as `config.stop_after` says,
    with a report; ValueError where the workdir is another run's, or hosts disagree; RuntimeError where another job
    trains in it; DamagedError for a checkpoint whose numbers are not those saved.
    """
    parse_resume(resume)
    check_same(differences, as_json(config), code_version())
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
            state = open_state(config, weights, mesh, checkpoints, resume)
        run = _Run(config, source, mesh, workdir, checkpoints, about or {}, progress)
        return run.steps(state, weights, on_samples)


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
        self.pending: list[tuple[int, str, dict]] = []

    def steps(self, state: TrainState, weights: Weights, on_samples: OnSamples | None) -> TrainState:
        config, start = self.config, int(state.step)
        networks = weights.networks(config, self.mesh)
        steps = make_steps(config, jnp.asarray(self.source.null_text), sharded_attention(self.mesh))
        if self.workdir is not None and self.first:
            self.writer = MetricsWriter(self.workdir, start, tensorboard=config.tensorboard, wandb=config.wandb)
        agreed, stopping, compiled = Agreement(self.mesh), False, set()
        bar = tqdm(
            total=config.steps,
            initial=start,
            desc=self.progress,
            unit="step",
            disable=not (self.progress and self.first),
        )
        with StopSignal() as stop, bar, contextlib.closing(self):
            for step, batch in self._batches(start):
                name = step_name(config.method, step)
                new = self.progress and self.first and name not in compiled
                with waiting(f"{self.progress}: compiling the {name} step" if new else ""):
                    state, metrics = steps[name](state, networks, batch)
                compiled.add(name)
                self.pending.append((step, name, metrics))
                bar.update()
                done, last = step + 1, step + 1 == config.steps
                stopping = agreed(stop.asked) and not last
                if done % config.log_every == 0 or last or stopping:
                    bar.set_postfix(self._flush(state))
                if on_samples and config.sample_every and (done % config.sample_every == 0 or last):
                    on_samples(done, state)
                if self.checkpoints and (done % config.checkpoint_every == 0 or last or stopping):
                    self.checkpoints.save(done, state, self._about(done))
                if stopping:
                    break
        if stopping:
            raise Interrupted(int(state.step), self.workdir)
        return state

    def _batches(self, start: int) -> Iterator[tuple[int, Any]]:
        """Batches on the mesh; each process reads the samples of its own devices."""
        stop, sharding = self.config.steps, batch_sharding(self.mesh)
        rows = local_rows(sharding, self.config.data.batch_size)
        for step, batch in zip(range(start, stop), batches(self.source, start, stop, rows), strict=True):
            yield step, place_batch(batch, sharding, rows, self.config.data.batch_size)

    def _about(self, step: int) -> dict[str, Any]:
        return self.about | {"data": {"position": step * self.config.data.batch_size}}

    def _flush(self, state: TrainState) -> dict[str, str]:
        """Writes what is waiting, and ends a run that learns nothing; the newest losses."""
        record: dict[str, np.ndarray] = {}
        trouble = None
        for step, name, metrics in jax.device_get(self.pending):
            record = {key: value for key, value in metrics.items() if not key.startswith(BAD)}
            if self.writer:
                self.writer.add(step, name, record)
            try:
                self.guard.check(step, name, metrics)
            except StoppedLearningError as error:
                trouble = trouble or error
        self.pending.clear()
        if self.writer:
            self.writer.flush()
        if trouble:
            self._stop(trouble, state)
        if self.checkpoints:
            self.checkpoints.check()
        return {key: f"{value:.3g}" for key, value in record.items() if key.startswith("loss")}

    def _stop(self, trouble: StoppedLearningError, state: TrainState) -> None:
        """Saves the state, which the updates left out have not touched, and leaves a report."""
        if self.checkpoints is None:
            raise trouble
        step = int(state.step)
        self.checkpoints.save(step, state, self._about(step))
        report = self.guard.report(self.workdir) if self.first else self.workdir
        raise StoppedLearningError(f"{trouble}; {report} has the samples; saved before step {step}") from trouble

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        if self.checkpoints:
            self.checkpoints.wait()
