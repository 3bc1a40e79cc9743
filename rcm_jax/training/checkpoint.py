"""Checkpoints of the whole training state (Orbax, asynchronous, the newest k kept), and the workdir that holds them.

workdir/
    config.json        the run's config; a workdir belongs to one
    checkpoints/STEP/  the state before step STEP
"""

import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from rcm_jax.outputs import unfinished
from rcm_jax.training.config import RunConfig
from rcm_jax.training.state import TrainState


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    out = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def claim_workdir(workdir: str | Path, config: RunConfig) -> Path:
    """Makes the workdir, or checks that it is this config's.

    Raises ValueError listing the differing settings where the workdir holds another config's run, and OSError with
    the path where it cannot be written. What was there stays as it was.
    """
    workdir = Path(workdir).absolute()
    file = workdir / "config.json"
    mine = json.loads(json.dumps(config.to_dict()))
    if file.exists():
        theirs, ours = _flat(json.loads(file.read_text())), _flat(mine)
        differ = [
            f"{key}: {theirs.get(key, 'absent')} in the workdir, {ours.get(key, 'absent')} now"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key) and key not in RunConfig.CADENCE
        ]
        if differ:
            raise ValueError(
                f"{workdir} holds a run of another config; use a new workdir, or make these equal:\n  "
                + "\n  ".join(differ)
            )
    try:
        with unfinished(file) as new:
            new.write_text(json.dumps(mine, indent=1))
    except OSError as error:
        raise OSError(f"cannot write to the workdir {workdir}: {error.strerror}") from error
    return workdir


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, keep: int):
        self.folder = workdir / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing and returns; a checkpoint counts as one only when it is whole."""
        if step != self.latest():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved before `step`, with the shapes, dtypes and shardings of `like` (may be abstract)."""
        return self._manager.restore(step, args=ocp.args.StandardRestore(like))

    def wait(self) -> None:
        """Until everything is on disk. Raises what the writing raised, a full disk included."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def abstract_like(tree, shardings):
    """Shapes and dtypes of `tree` with the given shardings, for `restore`."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
