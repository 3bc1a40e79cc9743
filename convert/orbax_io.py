"""Our checkpoint folder: model.json with the info, params/ with the weights as Orbax keeps them.

Orbax takes arrays whole, and a stacked leaf of a large network alone may be larger than memory. So Orbax lays out the
checkpoint, with one chunk a layer, and the numbers are put into its arrays afterwards, chunk by chunk.
"""

import dataclasses
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict

from rcm_jax.convert.journal import Journal
from rcm_jax.convert.safetensors_io import read_safetensors
from rcm_jax.convert.tensors import Tensor
from rcm_jax.model_file import ASIDE, ORBAX_ASIDE, ORBAX_INFO, ORBAX_PARAMS, ModelInfo
from rcm_jax.tensor_stream import write_safetensors


class _EmptyArrays(ocp.type_handlers.NumpyHandler):
    """Makes the arrays of unread tensors and writes nothing into them."""

    async def _open_and_write(self, value: Tensor, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        tspec["metadata"]["chunks"] = [min(value.block_rows, value.shape[0]), *value.shape[1:]]
        await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)


def _array(folder: Path) -> ts.TensorStore:
    place = {"driver": "file", "path": str(folder)}
    return ts.open({"driver": "zarr", "kvstore": place, "store_data_equal_to_fill_value": True}).result()


def read_orbax(folder: Path) -> dict[str, Tensor]:
    """The parameters of a folder that `write_orbax` made, by our names, and what is aside, unread."""

    def tensor(name: str, path: Path) -> Tensor:
        store = _array(path)
        dtype = store.dtype.numpy_dtype
        whole = Tensor(store.shape, dtype, lambda: store.read().result(), origin=name)
        if store.chunk_layout.read_chunk.shape[0] > 1:
            return whole
        rows = [Tensor(store.shape[1:], dtype, lambda i=i: store[i].read().result()) for i in range(store.shape[0])]
        return dataclasses.replace(whole, layers=tuple(rows))

    arrays = sorted(path.parent for path in (folder / ORBAX_PARAMS).glob("*/.zarray"))
    found = {path.name.replace(".", "/"): tensor(path.name.replace(".", "/"), path) for path in arrays}
    aside = folder / ORBAX_ASIDE
    return found | (read_safetensors(aside)[0] if aside.is_file() else {})


def write_orbax(
    folder: Path, tensors: Mapping[str, Tensor], info: ModelInfo, advance: Callable[[int], object], journal: Journal
) -> None:
    """Makes the folder, or goes on with what the journal knows of it. `model_file.load_model` reads it, and so does
    Orbax's own checkpointer."""
    aside = {name: tensor for name, tensor in tensors.items() if name.startswith(ASIDE)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in aside}
    params = (folder / ORBAX_PARAMS).absolute()
    if not params.exists():  # Orbax renames it when it is laid out
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _lay_out(params, tensors)
    for name, tensor in tensors.items():
        store = _array(params / name.replace("/", "."))
        for start in range(0, tensor.shape[0], tensor.block_rows):
            rows = slice(start, min(start + tensor.block_rows, tensor.shape[0]))
            if journal.kept(lambda rows=rows, store=store: _checksum(store[rows].read().result())) is None:
                numbers = tensor.read((rows, *[slice(None)] * (len(tensor.shape) - 1)))
                store[rows].write(numbers).result()
                journal.add(_checksum(numbers))
            advance(tensor.nbytes * (rows.stop - rows.start) // tensor.shape[0])
    if aside:
        write_safetensors(folder / ORBAX_ASIDE, aside, {}, advance, journal)
    (folder / ORBAX_INFO).write_text(info.to_json())


def _lay_out(params: Path, tensors: Mapping[str, Tensor]) -> None:
    registry = ocp.type_handlers.create_type_handler_registry(
        (Tensor, _EmptyArrays()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=False, use_zarr3=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(params, args=ocp.args.PyTreeSave(unflatten_dict(tensors, sep="/")))


def _checksum(numbers: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(numbers).reshape(-1).view(np.uint8))
