"""What a path holds: one file of weights, or a folder of them, in any of the formats met in the wild."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcm_jax.convert.orbax_io import read_orbax
from rcm_jax.convert.safetensors_io import read_safetensors
from rcm_jax.convert.tensors import Tensor
from rcm_jax.convert.torch_io import read_torch
from rcm_jax.model_file import FORMAT, ORBAX_INFO

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclasses.dataclass(frozen=True)
class Weights:
    """groups: each dictionary of tensors in the file, by the path of its keys ("" for the outermost).
    metadata: of a safetensors file. config: the config.json beside the file, {} without one."""

    path: Path
    groups: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]


def open_weights(path: str | Path) -> Weights:
    """Opens a file or folder, no tensor read. Raises FileNotFoundError, or ValueError that says what is wrong."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder at {path}")
    if (path / ORBAX_INFO).is_file():
        metadata = {"format": FORMAT, "info": (path / ORBAX_INFO).read_text()}
        return Weights(path, {"": read_orbax(path)}, metadata, {})
    files = _folder(path) if path.is_dir() else [path]
    opened = [_file(file) for file in files]
    groups, metadata = opened[0]
    for file, (more, _) in zip(files[1:], opened[1:], strict=True):
        both = sorted(set(groups.get("", {})) & set(more.get("", {})))
        if both:
            raise ValueError(f"{file} repeats tensors of the other shards: {both}")
        groups = {"": groups.get("", {}) | more.get("", {})}
    beside = (path if path.is_dir() else path.parent) / "config.json"
    return Weights(path, groups, metadata, _json(beside) if beside.is_file() else {})


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _folder(folder: Path) -> list[Path]:
    """The files of the one network in a folder: those its index names, a numbered set, or a single file."""
    indices = sorted(folder.glob("*.index.json"))
    if len(indices) == 1:
        names = sorted(set(_json(indices[0]).get("weight_map", {}).values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent or not names:
            raise ValueError(f"{indices[0]} names {len(names)} files, of which these are not there: {absent}")
        return [folder / name for name in names]
    for suffix in SUFFIXES:
        files = sorted(folder.glob(f"*{suffix}"))
        total = files[0].stem.rpartition("-of-")[2] if files else ""
        if len(files) == 1 and not total.isdigit():
            return files
        if total.isdigit() and all(file.stem.endswith(f"-of-{total}") for file in files):
            if len(files) != int(total):
                raise ValueError(f"{folder} has {len(files)} of the {int(total)} files {files[0].name}, …")
            return files
        if files:
            raise ValueError(f"{folder} has several networks; give one of {[str(file) for file in files]}")
    inside = sorted(str(f.parent) for f in folder.glob("*/config.json") if any(f.parent.glob("*.safetensors")))
    raise ValueError(
        f"{folder} has no {' '.join(SUFFIXES)} file" + (f"; its networks are in {inside}" if inside else "")
    )


def _file(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """The format is told by the first bytes, not by the name."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head[8:9] == b"{":
        tensors, metadata = read_safetensors(path)
        return {"": tensors}, metadata
    if head.startswith((b"PK\x03\x04", b"\x80")):
        groups: dict[str, dict[str, Tensor]] = {}
        _collect(read_torch(path), "", groups)
        return groups, {}
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` where it comes from")
    if head.startswith(b"GGUF"):
        raise ValueError(f"{path} is a GGUF file; quantised weights are not read: use those it was made from")
    kind = "is empty" if not head else "is neither a safetensors nor a PyTorch file"
    raise ValueError(f"{path} {kind} (it begins with {head[:16]!r})")


def _collect(value: Any, path: str, groups: dict[str, dict[str, Tensor]]) -> None:
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if isinstance(item, Tensor):
            groups.setdefault(path, {})[str(key)] = dataclasses.replace(item, origin=str(key))
        else:
            _collect(item, f"{path}.{key}" if path else str(key), groups)
