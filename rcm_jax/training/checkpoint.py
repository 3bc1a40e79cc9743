"""Checkpoints of the whole training state (Orbax, asynchronous), verified when they are read.

checkpoints/STEP/
    state/     the state before step STEP
    about/     JSON: step, data position, config, code, models, and a checksum of every leaf
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import PyTree

from rcm_jax.checksums import checksums
from rcm_jax.outputs import check_folder
from rcm_jax.training.hosts import wait_for_all
from rcm_jax.training.state import TrainState


class DamagedError(ValueError):
    """A checkpoint that is there and not whole."""


class Checkpoints:
    """The checkpoints of one workdir, on a mesh; on several hosts all call the same methods in the same order.

    keep: so many of the newest stay; and with `keep_every` those of every so many steps.
    """

    def __init__(self, workdir: Path, mesh: Mesh, keep: int, keep_every: int = 0):
        self.folder, self._aside, self._mesh = workdir / "checkpoints", workdir / "set_aside", mesh
        if jax.process_index() == 0:  # who holds the workdir: no other job is writing these
            for killed in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(killed)
        wait_for_all("checkpoints")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "about"))

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def save(self, step: int, state: TrainState, about: dict[str, Any]) -> None:
        """Starts writing and returns; a checkpoint counts as one only when it is whole. Raises OSError where the one
        before it could not be written."""
        if step == self.latest():
            return
        about = about | {"step": step, "checksums": checksums(state, self._mesh)}
        a_layer = jax.tree.map(lambda x: ocp.SaveArgs(shard_axes=(0,) if x.ndim > 2 else ()), state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state, save_args=a_layer),  # so that they can be read one by one
            about=ocp.args.JsonSave(about),
        )
        with self._writing():
            check_folder(self.folder, "")  # Orbax' threads would wait ten minutes for it
            self._manager.save(step, args=items)

    def check(self) -> None:
        """Raises what a save in the background has raised."""
        with self._writing():
            self._manager.check_for_errors()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state saved before `step`, with the shapes, dtypes and shardings of `like` (may be abstract), and what
        its save was told of it. Raises DamagedError that names the file where its numbers are not those saved."""
        where = self.folder / str(step)
        about = self.about(step)
        try:
            saved = about["checksums"]
            state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]
        except Exception as error:  # Orbax, TensorStore, JSON: each has kinds of its own
            raise DamagedError(f"{_file_in(error, where)} is damaged: {_first_words(error)}") from error
        now = checksums(state, self._mesh)
        if wrong := [name for name in now.keys() | saved.keys() if now.get(name) != saved.get(name)]:
            raise DamagedError(
                f"{where / 'state'} is damaged: {len(wrong)} of {len(saved)} arrays are not as they were saved, "
                f"{min(wrong)} among them"
            )
        return state, about

    def about(self, step: int) -> dict[str, Any]:
        """What the save of `step` was told of it. Raises DamagedError."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        except Exception as error:
            where = self.folder / str(step)
            raise DamagedError(f"{_file_in(error, where)} is damaged: {_first_words(error)}") from error

    def whole_before(self, step: int, like: TrainState) -> int | None:
        """The newest checkpoint before `step` that restores."""
        for older in reversed([s for s in self.steps() if s < step]):
            try:
                self.restore(older, like)
            except DamagedError:
                continue
            return older
        return None

    def set_aside(self, after: int) -> list[Path]:
        """Moves what is newer than step `after` out of the way of a run that goes on from there; where to."""
        places = []
        for step in (s for s in self.steps() if s > after):
            names = (self._aside / f"{step}{again}" for again in ("", *(f"-{i}" for i in range(2, 1000))))
            places.append(next(place for place in names if not place.exists()))
            if jax.process_index() == 0:
                self._aside.mkdir(exist_ok=True)
                shutil.move(self.folder / str(step), places[-1])
        if places:
            wait_for_all("set_aside")
            self._manager.reload()
        return places

    def wait(self) -> None:
        """Until everything is on disk. Raises what the writing raised, a full disk included."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of another thread, of Orbax, TensorStore or the system
            whole = [step for step in self.steps() if os.path.isdir(self.folder / str(step))]  # pathlib's may raise
            left = f"step {max(whole)} is the newest that is whole" if whole else "none is whole"
            raise OSError(f"cannot write a checkpoint in {self.folder}: {_first_words(error)}; {left}") from error


def _first_words(error: Exception) -> str:
    """What an error says, without the paragraphs that follow."""
    text = " ".join(str(error).split())
    text = re.sub(r" ?\[\S+=.*?\]", "", text).strip()
    text = text if len(text) < 240 else f"{text[:100]} … {text[-120:]}"  # the reason is often last
    return text or type(error).__name__


def _file_in(error: Exception, where: Path) -> Path:
    """The file that an error speaks of, or the checkpoint."""
    found = re.search(re.escape(str(where)) + r"[^\s\"':\]]*", str(error))
    return Path(found[0]) if found else where


def abstract_like(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes and dtypes of `tree` with the given shardings, for `restore`."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
