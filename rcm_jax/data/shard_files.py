"""Shards: tars of samples. Ours are written here; these and the published ones are read.

    write_shard(Path("set/shard-000000.tar"), samples)
    shard = open_shard(find_shards("set")[0])
    sample = shard.read(0)

Ours has a member `KEY.safetensors` a sample: the tensors by the names of `Sample`'s fields, the prompt in the
metadata. A sample is therefore whole or not there. The published ones have three in a row, `KEY.latent.pt` (channels
first), `KEY.embed.pt`, `KEY.prompt.txt`, in a folder a sample where they were merged.
"""

import dataclasses
import fnmatch
import hashlib
import os
import sys
import tarfile
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from tqdm import tqdm

from rcm_jax.convert.safetensors_io import read_safetensors_bytes
from rcm_jax.convert.tensors import Tensor
from rcm_jax.convert.torch_io import read_torch_bytes
from rcm_jax.data import storage
from rcm_jax.data.sample import Sample
from rcm_jax.data.tar_members import (
    BLOCK,
    INDEX,
    LyingIndexError,
    Member,
    check_header,
    index_json,
    read_index,
    scan,
    scan_once,
)
from rcm_jax.finite import check_finite
from rcm_jax.outputs import unfinished

PATTERN = "shard*.tar"
OURS = ".safetensors"
PUBLISHED = (".latent.pt", ".embed.pt", ".prompt.txt")
_GAP = 64 << 10  # members so near to each other are read at once


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """What a manifest says of a shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


def find_shards(folder: str | os.PathLike) -> list[str]:
    """Every `shard*.tar` of a folder, here or at an fsspec address, in name order; a shard's own path is that one.

    Raises FileNotFoundError where there is none, OSError where the place does not answer.
    """
    folder = os.fspath(folder)
    if folder.endswith(".tar"):
        storage.size(folder)
        return [folder]
    there = storage.names(folder)
    found = sorted(name for name in there if fnmatch.fnmatchcase(name, PATTERN))
    if not found:
        others = f"; it holds {', '.join(sorted(there)[:3])}" + (" …" if len(there) > 3 else "") if there else ""
        raise FileNotFoundError(f"{folder} has no {PATTERN}{others}")
    return [there[name] for name in found]


def write_shard(path: Path, samples: Iterable[Sample]) -> ShardRecord:
    """A shard and its index, under their names only when they are whole and on disk.

    Raises ValueError for a key that comes twice or that a tar cannot hold, FloatingPointError for latents or texts that
    are not finite; nothing is left then.
    """
    path, members, total, digest = Path(path), {}, 0, hashlib.sha256()
    with unfinished(path) as new:
        with open(new, "wb") as file:

            def put(data: bytes) -> None:
                nonlocal total
                digest.update(data)
                total += file.write(data)

            for sample in samples:
                data = _packed(sample)
                name = sample.key + OURS
                if name in members:
                    raise ValueError(f"{path}: the key {sample.key} comes twice")
                members[name] = Member(name, total, len(data))
                put(_header(name, len(data), path))
                put(data)
                put(bytes(-len(data) % BLOCK))
            put(bytes(2 * BLOCK))
            _to_disk(file)
        with unfinished(path.with_name(path.name + INDEX)) as index, open(index, "w") as file:
            file.write(index_json(members.values(), total))
            _to_disk(file)
    _folder_to_disk(path.parent)
    return ShardRecord(path.name, len(members), total, digest.hexdigest())


def _packed(sample: Sample) -> bytes:
    for name, tensor in sample.tensors.items():
        check_finite(tensor, f"{sample.key}: {name}")
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in sample.tensors.items()}
    return save(tensors, {"prompt": sample.prompt})


def _header(name: str, size: int, path: Path) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        if name in (OURS, "/" + OURS) or name.startswith("/") or ".." in name.split("/"):
            raise ValueError("it is no name in a folder")
        return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError as error:  # UnicodeEncodeError is one
        raise ValueError(f"{path}: a member of a tar cannot be called {name!r}: {error}") from error


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    """The names in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_shard(address: str | os.PathLike) -> "Shard":
    """Where the samples of a shard lie: by its index, or by its headers; no sample is read.

    Raises FileNotFoundError where there is no such file, OSError where its place does not answer.
    """
    address = os.fspath(address)
    size = storage.size(address)
    try:
        members, wrong = read_index(address, size), ""
    except LyingIndexError as error:
        _say(str(error))
        members = None
    if members is None:
        members, wrong = scan_once(address, size)
    return Shard(address, size, members, wrong)


class Shard:
    """The samples of one shard by number; safe to read from many threads.

    keys: one a sample; of a name that comes twice the last counts.
    broken: a line for each sample that is not complete, and for the file where it is cut off or damaged.
    """

    def __init__(self, address: str, size: int, members: Sequence[Member], wrong: str):
        self.address, self.size, self._rescanned, self._lock = address, size, False, threading.Lock()
        self._places, broken = _grouped(members)
        self.keys = tuple(self._places)
        self.broken = (*((f"{address}: {wrong}",) if wrong else ()), *(f"{address}: {line}" for line in broken))

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, i: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.address}: {self.keys[i]}"

    def read(self, i: int) -> Sample:
        """Sample i, as it is stored; its tensors are views. Raises ValueError that names shard and key where it is not
        whole, or wants to run code, and OSError where the shard's place does not answer."""
        key, rescanned = self.keys[i], self._rescanned
        try:
            parts = self._parts(key)
        except LyingIndexError as error:
            if rescanned:
                raise
            self._rescan(str(error))
            if key not in self._places:
                raise ValueError(f"{self.name(i)} is in the index and not in the shard") from error
            parts = self._parts(key)
        try:
            return _unpacked(key, parts)
        except (ValueError, TypeError) as error:
            text = str(error)
            raise ValueError(text if text.startswith(self.address) else f"{self.address}: {text}") from error

    def _rescan(self, why: str) -> None:
        """Puts what the headers say in the place of an index that is not true. What is there keeps its number."""
        with self._lock:
            if not self._rescanned:
                _say(f"{why}; what was known of it is not true, so all headers are read")
                self._places = _grouped(scan(self.address, self.size)[0])[0]
                self._rescanned = True

    def _parts(self, key: str) -> dict[str, memoryview]:
        """The data of a sample's members by their fields, in one read where they lie together."""
        members, data = dict(self._members(key)), {}
        for run in _runs(sorted(members.values(), key=lambda member: member.offset)):
            start = run[0].offset
            whole = memoryview(storage.read(self.address, start, run[-1].stop))
            for member in run:
                check_header(member, whole[member.offset - start :][:BLOCK], self.address)
                data[member] = whole[member.start - start : member.stop - start]
        return {field: data[member] for field, member in members.items()}

    def _members(self, key: str) -> Iterator[tuple[str, Member]]:
        """By their fields; what places keep are numbers alone, since a set has a million names."""
        places = self._places[key]
        for field, offset, size in zip(
            (OURS,) if len(places) == 2 else PUBLISHED, places[::2], places[1::2], strict=True
        ):
            yield field, Member(key + field, offset, size)


def _runs(members: Sequence[Member]) -> Iterator[list[Member]]:
    run: list[Member] = []
    for member in members:
        if run and member.offset - run[-1].stop > _GAP:
            yield run
            run = []
        run.append(member)
    yield run


def _grouped(members: Iterable[Member]) -> tuple[dict[str, array], list[str]]:
    """Offset and size of each member of the complete samples, field by field, and a line for each incomplete one."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, rest = base.partition(".")
        if base.endswith(OURS):
            stem, dot, rest = base.removesuffix(OURS), OURS, ""
        if stem and (field := dot + rest) in (OURS, *PUBLISHED):
            samples.setdefault(folder + slash + stem, {})[field] = member
    whole, lacking = {}, []
    for key, found in samples.items():
        fields = (OURS,) if OURS in found else PUBLISHED
        if missing := [field for field in fields if field not in found]:
            lacking.append(f"{key} lacks {', '.join(missing)}")
        else:
            whole[key] = array("q", [n for field in fields for n in found[field][1:]])
    return whole, lacking


def _unpacked(key: str, parts: dict[str, memoryview]) -> Sample:
    if OURS in parts:
        tensors, metadata = read_safetensors_bytes(parts[OURS], key + OURS)
        unknown = tensors.keys() - {field.name for field in dataclasses.fields(Sample)}
        if unknown or not {"latents", "text"} <= tensors.keys():
            raise ValueError(f"{key}{OURS} holds {sorted(tensors)}, and a sample has latents and text")
        return Sample(key, **tensors, prompt=metadata.get("prompt", ""))
    latents, text = (_bare(parts[field], key + field) for field in PUBLISHED[:2])
    if latents.ndim not in (4, 5):
        raise ValueError(f"{key}: latents have shape {latents.shape}, and are [C, T, h, w] or [K, C, T, h, w]")
    return Sample(key, np.moveaxis(latents, -4, -1), text, bytes(parts[PUBLISHED[2]]).decode())


def _bare(data: memoryview, name: str) -> np.ndarray:
    """The tensor of a `.pt` file that holds nothing else."""
    found = read_torch_bytes(data, name)
    if not isinstance(found, Tensor):
        raise ValueError(f"{name} is a {type(found).__name__.lstrip('_')}, and not a tensor alone")
    if found.nbytes > len(data):
        raise ValueError(f"{name} is a tensor of shape {found.shape} that repeats the numbers of a smaller one")
    return found.load()


def _say(words: str) -> None:
    tqdm.write(words, file=sys.stderr)
