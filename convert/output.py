"""Writing a network: ours or theirs, in a stream, whole or not at all."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm_jax.convert.files import files_of
from rcm_jax.convert.journal import Journal, journal_at
from rcm_jax.convert.orbax_io import write_orbax
from rcm_jax.convert.tensors import Tensor, total_bytes
from rcm_jax.hub import OF_FILES
from rcm_jax.model_file import ASIDE, FORMAT, ORBAX_ASIDE, ORBAX_INFO, ORBAX_PARAMS, ModelInfo
from rcm_jax.outputs import check_folder, check_room
from rcm_jax.progress import byte_bar
from rcm_jax.tensor_stream import write_safetensors

ONE_FILE = "diffusion_pytorch_model.safetensors"  # as Wan2.1's own folders call theirs
TORCH = (".safetensors", ".pt", ".pth")
FORMS: dict[str, tuple[str, ...]] = {  # endings of each form of a network; none: a folder
    "safetensors": (".safetensors",), "orbax": (), "wan": TORCH, "rcm": TORCH, "diffusers": (), "transformers": (),
}  # fmt: skip


def check_form(path: Path, form: str, *, shards: bool = False) -> None:
    """Raises ValueError for a name that the form of a network does not have: a folder is not called as a file is.
    shards: it is written in several files, for which it is a folder."""
    suffixes = () if shards else FORMS[form]
    stem = path.with_suffix("") if path.suffix in OF_FILES else path
    if suffixes and path.suffix not in suffixes:
        words = " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))
        raise ValueError(f"{path}: the {form} form is a {words} file; give {stem}{suffixes[0]}")
    if not suffixes and path.suffix in OF_FILES:
        raise ValueError(f"{path}: the {form} form is a folder; give {stem}")


def check_place(path: Path, *, overwrite: bool) -> None:
    """Raises FileExistsError where there is something at `path` already and `overwrite` is not set, or a folder of more
    than one network, and ArgumentError where its folder cannot be written in."""
    check_folder(path.parent, "")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; --overwrite replaces it")
    if path.is_dir() and not _one_network(path):
        raise FileExistsError(f"{path} is a folder, and not one of a network alone: it is not replaced")


def _one_network(folder: Path) -> bool:
    """Whether a folder holds nothing but what is written here: our checkpoint, or a library's network."""
    names = {path.name for path in folder.iterdir()}
    if ORBAX_INFO in names:
        return names <= {ORBAX_INFO, ORBAX_PARAMS, ORBAX_ASIDE}
    about = "config.json" in names or any(name.endswith(".index.json") for name in names) or names == {ONE_FILE}
    return about and all(name.endswith((".json", ".safetensors")) for name in names)


def check_apart(path: Path, sources: Sequence[Path]) -> None:
    """Raises FileExistsError where writing to `path` would take away what is read: a source, also through links; one of
    its files; a folder around it."""
    if not path.exists():
        return
    real = path.resolve()
    for source in filter(Path.exists, sources):
        if path.is_dir() and real in (source.resolve(), *source.resolve().parents):
            raise FileExistsError(f"{path} is what is read, or holds it ({source}): give another name")
        for file in files_of(source):
            inside = file.resolve() in real.parents  # of a checkpoint folder, which is one whole
            if inside or file.resolve() == real or path.samefile(file):
                raise FileExistsError(f"{path} is what is read ({file}): give another name")


@contextlib.contextmanager
def unfinished(path: Path, size: int, *, overwrite: bool) -> Iterator[Path]:
    """A name beside `path` to write to, file or folder; it becomes `path` when the block ends well, else it goes.

    Raises as `check_place`, and OSError where the disk has less than `size` bytes left; nothing is changed then.
    """
    with resumed(path, size, None, overwrite=overwrite) as (new, _):
        yield new


@contextlib.contextmanager
def resumed(
    path: Path, size: int, of: Mapping[str, Any] | None, *, overwrite: bool
) -> Iterator[tuple[Path, Journal]]:  # fmt: skip
    """`unfinished`, and the journal of what is written to it. of: what is made of what (`journal.made_of`); where a
    process that died had begun the same, what it had written is still there."""
    check_place(path, overwrite=overwrite)
    new = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with journal_at(path, of) as journal, _cleared(new):
            if not journal.goes_on:
                _remove(new)
            check_room(path, size - _bytes_in(new))
            yield new, journal
            _replace(path, new)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _cleared(new: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _remove(new)


def _replace(path: Path, new: Path) -> None:
    if path.exists() and (path.is_dir() or new.is_dir()):
        old = path.with_name(path.name + ".old")
        os.replace(path, old)
        os.replace(new, path)
        _remove(old)
    else:
        os.replace(new, path)


def _bytes_in(place: Path) -> int:
    files = [file for file in place.rglob("*") if file.is_file()] if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.exists())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def bytes_of(text: str) -> int:
    """Of "5GB", "500MB" or a number of bytes, in powers of ten as files are counted. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]?)i?B?", text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r} is no size: give 5GB or 500MB")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()])


def write_shards(
    folder: Path, file: str, tensors: Mapping[str, Tensor], limit: int, advance: Callable[[int], object],
    journal: Journal,
) -> None:  # fmt: skip
    """One safetensors file of that name in a folder, or, where they are larger than `limit` bytes together, several and
    an index, as diffusers and transformers have them. A tensor that is larger itself has a file of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and total_bytes(shards[-1]) + tensor.nbytes > limit:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / file, tensors, {"format": "pt"}, advance, journal)
        return
    stem, places = file.removesuffix(".safetensors"), {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, {"format": "pt"}, advance, journal)
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": places}
    (folder / f"{file}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_model(
    path: Path, tensors: Mapping[str, Tensor], info: ModelInfo, *, format: str = "safetensors",
    overwrite: bool = False, besides: Mapping[str, Tensor] | None = None, of: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Our model file, or for format "orbax" our checkpoint folder. Memory holds one layer at a time.

    `rcm_jax.model_file.load_model` reads both. besides: what is kept for the way back, by Wan2.1's names. of: see
    `resumed`. Raises as `unfinished`.
    """
    tensors = {**tensors, **{ASIDE + name: tensor for name, tensor in (besides or {}).items()}}
    size = total_bytes(tensors)
    with resumed(path, size, of, overwrite=overwrite) as (new, journal), byte_bar(path.name, size) as advance:
        if format == "orbax":
            write_orbax(new, tensors, info, advance, journal)
        else:
            write_safetensors(new, tensors, {"format": FORMAT, "info": info.to_json()}, advance, journal)
