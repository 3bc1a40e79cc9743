"""Whether files are what was written: their tensors against the checksums that they carry."""

import json
from collections.abc import Iterator
from pathlib import Path

from rcm_jax.convert.files import files_of
from rcm_jax.convert.safetensors_io import read_header
from rcm_jax.convert.torch_io import damaged_entries
from rcm_jax.hub import Place, fetched, find
from rcm_jax.progress import byte_bar
from rcm_jax.tensor_stream import SUMS, checksum

NONE = "its {} has no checksums; .safetensors files that rcm_jax writes have them, and PyTorch's zips"


def lines_of_check(path: str | Place) -> Iterator[str]:
    """A line for each file that is whole. Reads all of them. Raises ValueError that names the tensors that are not what
    was written, or a file without checksums."""
    place = find(path)
    files = [file for file in files_of(place) if file.suffix != ".json"]
    if any(file.is_dir() for file in files):
        raise ValueError(f"{path} cannot be verified: {NONE.format('form, Orbax,')}")
    for file in map(fetched, files):
        count, size = check_file(file)
        yield f"{file}: {count} tensors, {size / 1e9:.2f} GB, are what was written"


def sums_of(metadata: dict[str, str]) -> dict[str, int]:
    """The checksums in a file's metadata, {} where there are none."""
    try:
        return {name: int(text, 16) for name, text in json.loads(metadata.get(SUMS, "{}")).items()}
    except (ValueError, TypeError, AttributeError):  # what it is there for
        return {}


def check_file(path: Path) -> tuple[int, int]:
    """Tensors and bytes of one file that is what was written. Raises as `lines_of_check`."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head.startswith(b"PK\x03\x04"):
        return _check_zip(path)
    if not head.endswith(b"{"):
        raise ValueError(f"{path} cannot be verified: {NONE.format('format')}")
    entries, metadata, start = read_header(path)
    told = sums_of(metadata)
    if not told:
        raise ValueError(f"{path} cannot be verified: {NONE.format('header')}")
    ends = {name: entry["data_offsets"] for name, entry in entries.items()}
    size = sum(stop - begin for begin, stop in ends.values())
    wrong = sorted(told.keys() ^ entries.keys())
    with open(path, "rb") as file, byte_bar(f"verify {path.name}", size) as advance:
        for name, (begin, stop) in ends.items():
            file.seek(start + begin)
            if name in told and checksum(file, stop - begin) != told[name]:
                wrong.append(name)
            advance(stop - begin)
    _refuse(path, wrong)
    return len(ends), size


def _check_zip(path: Path) -> tuple[int, int]:
    size = path.stat().st_size
    with byte_bar(f"verify {path.name}", size) as advance:
        count, wrong = damaged_entries(path, advance)
    _refuse(path, wrong)
    return count, size


def _refuse(path: Path, wrong: list[str]) -> None:
    if wrong:
        raise ValueError(f"{path} is not what was written: {', '.join(wrong)}")
