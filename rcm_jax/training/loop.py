"""A run's steps in order: batches, the step that the schedule names, metrics, samples, checkpoints, resume.

Above it is `runs.py`, which opens files, calls `train` and writes the weights; below it `step.py`, what one step
computes. What a step computes depends on the config and the step alone, so a run that was killed and resumed gives the
same numbers as one that was not.
"""

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from rcm_jax.data.source import Source, batches
from rcm_jax.errors import Interrupted
from rcm_jax.parallel import batch_sharding, make_mesh, sharded_attention, state_shardings
from rcm_jax.progress import waiting
from rcm_jax.training.checkpoint import Checkpoints, abstract_like, claim_workdir
from rcm_jax.training.config import RunConfig
from rcm_jax.training.metrics import MetricsWriter
from rcm_jax.training.schedule import step_name
from rcm_jax.training.state import Start, TrainState, Weights, abstract_state, first_state
from rcm_jax.training.step import make_steps


class _StopSignal:
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


def open_state(config: RunConfig, weights: Start, mesh: Mesh, checkpoints: Checkpoints | None) -> TrainState:
    """The newest checkpoint's state, or the first one, sharded over the mesh."""
    latest = checkpoints.latest() if checkpoints else None
    if latest is None:
        return first_state(config, weights, mesh)
    state = abstract_state(config)
    return checkpoints.restore(latest, abstract_like(state, state_shardings(mesh, state)))


def train(
    config: RunConfig,
    source: Source,
    workdir: str | Path | None = None,
    *,
    weights: Start | None = None,
    devices: list | None = None,
    on_samples: Callable[[int, TrainState], None] | None = None,
    on_weights: Callable[[int, TrainState], None] | None = None,
    progress: str = "train",
) -> TrainState:
    """Trains from the newest checkpoint of `workdir`, or from the start, to `config.steps`; returns the last state.

    workdir: metrics and checkpoints go here; None keeps nothing on disk.
    on_samples: called as (step, state) every `config.sample_every` steps.
    on_weights: the same every `config.weights_every` steps, but for the last.
    Raises Interrupted after SIGTERM or SIGINT, with the state saved; ValueError where the workdir is another run's.
    """
    checkpoints = writer = None
    if workdir is not None:
        workdir = claim_workdir(workdir, config)
        checkpoints = Checkpoints(workdir, config.keep)
    mesh = open_mesh(config, devices)
    with jax.set_mesh(mesh):
        weights = weights or Weights()
        with waiting(progress and f"{progress}: preparing the state"):
            state = open_state(config, weights, mesh, checkpoints)
        start = int(state.step)
        networks = weights.networks(config, mesh)
        steps = make_steps(config, jnp.asarray(source.null_text), sharded_attention(mesh))
        sharding = batch_sharding(mesh)
        if workdir is not None:
            writer = MetricsWriter(workdir, start, tensorboard=config.tensorboard, wandb=config.wandb)
        compiled: set[str] = set()
        bar = tqdm(total=config.steps, initial=start, desc=progress, unit="step", disable=not progress)
        with _StopSignal() as stop, bar:
            for step, batch in zip(range(start, config.steps), batches(source, start, config.steps), strict=True):
                name = step_name(config.method, step)
                new = progress and name not in compiled
                with waiting(f"{progress}: compiling the {name} step" if new else ""):
                    state, metrics = steps[name](state, networks, jax.device_put(batch, sharding))
                compiled.add(name)
                bar.update()
                done, last = step + 1, step + 1 == config.steps
                if writer:
                    writer.add(step, name, metrics)
                    if done % config.log_every == 0 or last or stop.asked:
                        bar.set_postfix({k: f"{v:.3g}" for k, v in writer.flush().items() if k.startswith("loss")})
                if on_samples and config.sample_every and (done % config.sample_every == 0 or last):
                    on_samples(done, state)
                if on_weights and config.weights_every and done % config.weights_every == 0 and not last:
                    on_weights(done, state)
                if checkpoints and (done % config.checkpoint_every == 0 or last or stop.asked):
                    checkpoints.save(done, state)
                if stop.asked and not last:
                    break
            stopped = stop.asked and int(state.step) < config.steps
        if writer:
            writer.close()
        if checkpoints:
            checkpoints.wait()
            checkpoints.close()
        if stopped:
            raise Interrupted(int(state.step), workdir)
    return state
