"""What a path holds: one file of weights, or a folder of them, in any of the formats met in the wild.

On the hub, names and shapes of a safetensors file are read from its header; it is fetched when its numbers are asked
for. Other formats are fetched when they are opened.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rcm_jax.convert.comfyui import unscaled
from rcm_jax.convert.orbax_io import read_orbax
from rcm_jax.convert.safetensors_io import DTYPES, read_safetensors
from rcm_jax.convert.tensors import Tensor
from rcm_jax.convert.torch_io import read_torch
from rcm_jax.convert.torch_pickle import SetAside
from rcm_jax.hub import Place, Published, fetched, find, unreached
from rcm_jax.model_file import FORMAT, ORBAX_INFO

Opened = tuple[dict[str, dict[str, Tensor]], dict[str, str], dict[str, str]]
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
INDEX = ".index.json"


@dataclasses.dataclass(frozen=True)
class Weights:
    """groups: each dictionary of tensors in the file, by the path of its keys ("" for the outermost).
    metadata: of a safetensors file. config: the config.json beside the file, {} without one. objects: what else a
    pickle holds, by the path of its keys -> its class, of which nothing was run."""

    path: Place
    groups: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    objects: Mapping[str, str] = dataclasses.field(default_factory=dict)


def open_weights(path: str | Path | Published) -> Weights:
    """Opens a file or folder, here or on the hub, no tensor read. Raises FileNotFoundError, or ValueError that says
    what is wrong."""
    path = find(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder at {path}")
    if (path / ORBAX_INFO).is_file():
        folder = fetched(path)
        metadata = {"format": FORMAT, "info": (folder / ORBAX_INFO).read_text()}
        return Weights(path, {"": read_orbax(folder)}, metadata, {})
    files = _folder(path) if path.is_dir() else [path]
    folder = path if path.is_dir() else path.parent
    together = functools.cache(lambda: fetched(folder, [file.name for file in files]))
    opened = [_file(file, together) for file in files]
    groups, metadata, objects = opened[0]
    for file, (more, *_) in zip(files[1:], opened[1:], strict=True):
        both = sorted(set(groups.get("", {})) & set(more.get("", {})))
        if both:
            raise ValueError(f"{file} repeats tensors of the other shards: {both}")
        groups = {"": groups.get("", {}) | more.get("", {})}
    beside = folder / "config.json"
    try:
        groups = {name: unscaled(tensors, metadata) for name, tensors in groups.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Weights(path, groups, metadata, _json(beside) if beside.is_file() else {}, objects)


def read_tensor(path: Place) -> Tensor:
    """The one tensor of a .pt, .safetensors or .npy file, unread but for .npy. Raises ValueError for anything else."""
    path = fetched(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"\x93NUMPY"):
        return Tensor.of(np.load(path, allow_pickle=False), path.name)
    if head.startswith((b"PK\x03\x04", b"\x80")) and head[8:9] != b"{":
        whole = read_torch(path)
        found = [whole] if isinstance(whole, Tensor) else [*whole.values()] if isinstance(whole, dict) else []
    else:
        groups, *_ = _file(path, lambda: path.parent)
        found = [tensor for tensors in groups.values() for tensor in tensors.values()]
    if len(found) != 1 or not isinstance(found[0], Tensor):
        raise ValueError(f"{path} is not one tensor alone; it holds {len(found)} things")
    return found[0]


def files_of(path: Place) -> list[Place]:
    """The files that make up the network at a path; an Orbax checkpoint is one whole."""
    if not path.is_dir() or (path / ORBAX_INFO).is_file():
        return [path]
    about = [path / name for name in _names(path) if name == "config.json" or name.endswith(INDEX)]
    return [*_folder(path), *about]


def _names(folder: Place) -> list[str]:
    """Of the files in a folder, and one below."""
    if isinstance(folder, Published):
        return folder.files()
    return [file.relative_to(folder).as_posix() for at in ("*", "*/*") for file in folder.glob(at) if file.is_file()]


def _json(path: Place) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _folder(folder: Place) -> list[Place]:
    """The files of the one network in a folder: those its index names, a numbered set, or a single file."""
    below = _names(folder)
    here = sorted(name for name in below if "/" not in name)
    indices = [name for name in here if name.endswith(INDEX)]
    if len(indices) == 1:
        names = sorted(set(_json(folder / indices[0]).get("weight_map", {}).values()))
        absent = [name for name in names if name not in below]
        if absent or not names:
            raise ValueError(f"{folder / indices[0]} names {len(names)} files, of which these are not there: {absent}")
        return [folder / name for name in names]
    for suffix in SUFFIXES:
        files = [folder / name for name in here if name.endswith(suffix)]
        totals = {file.name.removesuffix(suffix).rpartition("-of-")[2] for file in files}
        total = next(iter(totals), "")
        if len(files) == 1 and not total.isdigit():
            return files
        if len(totals) == 1 and total.isdigit():
            if len(files) != int(total):
                raise ValueError(f"{folder} has {len(files)} of the {int(total)} files {files[0].name}, …")
            return files
        if files:
            raise ValueError(f"{folder} has several networks; give one of {[str(file) for file in files]}")
    parts = {name.partition("/")[0] for name in below if name.endswith(".safetensors") and name.count("/") == 1}
    inside = sorted(str(folder / part) for part in parts if f"{part}/config.json" in below)
    raise ValueError(
        f"{folder} has no {' '.join(SUFFIXES)} file"
        + (f"; its networks are in {inside}" if inside else "")
        + unreached(folder)
    )


def _file(path: Place, together: Callable[[], Path]) -> Opened:
    """Its groups, metadata and objects. The format is told by the first bytes, not by the name. together: fetches what
    belongs to the network; gives their folder."""
    if isinstance(path, Published) and path.suffix == ".safetensors" and not path.cached():
        return (*_unfetched(path, together), {})
    path = fetched(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if head[8:9] == b"{":
        tensors, metadata = read_safetensors(path)
        return {"": tensors}, metadata, {}
    if head.startswith((b"PK\x03\x04", b"\x80")):
        groups, objects = {}, {}
        _collect(read_torch(path), "", groups, objects)
        return groups, {}, objects
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` where it comes from")
    if head.startswith(b"GGUF"):
        raise ValueError(f"{path} is a GGUF file; quantised weights are not read: use those it was made from")
    kind = "is empty" if not head else "is neither a safetensors nor a PyTorch file"
    raise ValueError(f"{path} {kind} (it begins with {head[:16]!r})")


def _unfetched(path: Published, together: Callable[[], Path]) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """As the header says; the first tensor that is read fetches the file."""
    header = path.header()
    whole = functools.cache(lambda: read_safetensors(together() / path.name)[0])

    def tensor(name: str, info: Any) -> Tensor:
        if info.dtype not in DTYPES:
            raise ValueError(f"{path}: {name} has dtype {info.dtype}; known are {sorted(DTYPES)}")
        kind = np.dtype(DTYPES[info.dtype])
        return Tensor(tuple(info.shape), kind, lambda: whole()[name].load(), origin=name)

    return {"": {name: tensor(name, info) for name, info in header.tensors.items()}}, header.metadata


def _collect(value: Any, path: str, groups: dict[str, dict[str, Tensor]], objects: dict[str, str]) -> None:
    if isinstance(value, SetAside):
        objects[path] = value.kind
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if isinstance(item, Tensor):
            groups.setdefault(path, {})[str(key)] = dataclasses.replace(item, origin=str(key))
        else:
            _collect(item, f"{path}.{key}" if path else str(key), groups, objects)
