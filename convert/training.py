"""A network out of a checkpoint of a training run, WORKDIR/checkpoints/STEP: student, its average, or the fake score.

    STEP/state/   the state as Orbax keeps it: arrays by the names of its leaves, in one database of TensorStore
    STEP/about/   JSON of the run; `model` and `fake_model` are the ModelInfo of its networks

Only what is asked for is read, and a layer at a time where the checkpoint keeps layers apart, else a leaf.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from rcm_jax.checksums import checksum_of_part
from rcm_jax.convert.checkpoint import Checkpoint, ours_of
from rcm_jax.convert.files import Weights
from rcm_jax.convert.lora import Lora, of_parameters
from rcm_jax.convert.tensors import Tensor, total_bytes
from rcm_jax.finite import check_finite
from rcm_jax.model_file import FORMAT, info_from_json
from rcm_jax.progress import byte_bar

STATE, ABOUT = "state", "about"
LORA = "lora"  # entry of ABOUT, of a run that learns one
WHICH = {"average": "ema", "student": "student", "fake_score": "fake_score"}  # name -> field of the state
STACKED = "blocks"


def open_step(folder: Path, which: str = "average") -> Checkpoint:
    """The network of a run's checkpoint, no number read. Raises FileNotFoundError for a folder that is none, and
    ValueError for a network that the run does not have or a checkpoint that is damaged."""
    tensors, info, about = _network(folder, which)
    if LORA in about:
        raise ValueError(f"{folder} is of a run that learns a LoRA: `rcm-convert lora {folder} OUT` takes it out")
    metadata = {"format": FORMAT, "info": info}
    return dataclasses.replace(ours_of(Weights(folder, {"": tensors}, metadata, {})), entry=which)


def lora_of_step(folder: Path, which: str = "average") -> Lora:
    """The LoRA of a run's checkpoint. Raises as `open_step`, and where it is damaged."""
    tensors, info, about = _network(folder, which)
    if LORA not in about:
        raise ValueError(f"{folder} is of a run that learns whole networks: `rcm-convert checkpoint` takes them out")
    _verify(folder, which, tensors)
    info = info_from_json(info)
    return of_parameters(tensors, info.model, alpha=about[LORA]["alpha"], info=info, path=folder)


def _network(folder: Path, which: str) -> tuple[dict[str, Tensor], str, Mapping[str, Any]]:
    """One of a run: its tensors, its ModelInfo as JSON, and all that its checkpoint says."""
    about, tree = _json(folder, ABOUT, "metadata"), _json(folder, STATE, "_METADATA")
    info = about.get("fake_model" if which == "fake_score" else "model")
    if info is None:
        raise ValueError(f"{folder} says nothing of its {which}: the run has none, or is of an older version")
    keys = [[part["key"] for part in leaf["key_metadata"]] for leaf in tree["tree_metadata"].values()]
    names = sorted("/".join(key[1:]) for key in keys if key[0] == WHICH[which] and len(key) > 1)
    if not names:
        raise ValueError(f"{folder} has no {which}")
    arrays = _Arrays(folder, WHICH[which], "zarr3" if tree.get("use_zarr3") else "zarr")
    info = info if isinstance(info, str) else json.dumps(info)
    return {name: arrays.tensor(name) for name in names}, info, about


def verify_step(folder: Path, which: str = "average") -> None:
    """Raises ValueError that names the first array whose numbers are not those that were saved. Reads all of them."""
    _verify(folder, which, open_step(folder, which).ours())


def _verify(folder: Path, which: str, tensors: Mapping[str, Tensor]) -> None:
    saved, field = _json(folder, ABOUT, "metadata")["checksums"], WHICH[which]
    with byte_bar(f"verify {which}", total_bytes(tensors)) as advance:
        for name, tensor in tensors.items():
            parts, start = 0, 0
            for block in tensor.blocks():
                parts, start = parts + checksum_of_part(block, start), start + block.size
                advance(block.nbytes)
            if parts % 2**32 != saved.get(f"{field}/{name}"):
                raise ValueError(f"{folder} is damaged: {field}/{name} is not as it was saved")


def _json(folder: Path, item: str, name: str) -> Mapping[str, Any]:
    path = folder / item / name
    if not path.is_file():
        steps = sorted((p for p in [*folder.glob("*"), *folder.glob("checkpoints/*")] if p.name.isdigit()), key=str)
        near = f"; its checkpoints are {', '.join(map(str, steps))}" if steps else ""
        raise FileNotFoundError(f"{folder} is no checkpoint of a training run: it has no {item}/{name}{near}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


class _Arrays:
    """The arrays of one network of a checkpoint."""

    def __init__(self, folder: Path, field: str, driver: str):
        self.folder, self.field, self.driver = folder, field, driver
        self.whole = functools.lru_cache(maxsize=1)(self.read)  # of the leaf that is being walked through

    def tensor(self, name: str) -> Tensor:
        store = self._told(name, lambda: self._open(name))
        shape, dtype = tuple(store.shape), store.dtype.numpy_dtype
        if not name.startswith(f"{STACKED}/"):
            return Tensor(shape, dtype, lambda: self.read(name), origin=name)
        apart = store.chunk_layout.read_chunk.shape[0] == 1

        def layer(i: int) -> np.ndarray:
            return self.read(name, i) if apart else self.whole(name)[i]

        rows = (Tensor(shape[1:], dtype, functools.partial(layer, i), origin=f"{name}[{i}]") for i in range(shape[0]))
        return Tensor(shape, dtype, lambda: self.read(name), layers=tuple(rows), origin=name)

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        def numbers() -> np.ndarray:
            store = self._open(name)
            return (store if layer is None else store[layer]).read().result()

        return check_finite(self._told(name, numbers), f"{self.folder}, {self.field}/{name}")

    def _open(self, name: str) -> ts.TensorStore:
        path = f"{self.field}.{name.replace('/', '.')}/"
        base = {"driver": "file", "path": f"{(self.folder / STATE).absolute()}/"}
        return ts.open({"driver": self.driver, "kvstore": {"driver": "ocdbt", "base": base, "path": path}}).result()

    def _told(self, name: str, do: Any) -> Any:
        """TensorStore's errors have many lines, and do not say which checkpoint it is."""
        try:
            return do()
        except (ValueError, OSError) as error:
            why = str(error).splitlines()[0][:200]
            raise ValueError(f"{self.folder} is damaged: {self.field}/{name} cannot be read ({why})") from error
