"""Output paths: tried before anything is loaded or computed, so that what cannot be written is said first; and written
whole or not at all."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rcm_jax.errors import ArgumentError

PICTURES = (".png", ".pdf", ".svg")  # of drawings
BLOCK = 4096  # bytes: a file of none may be made where the disk is full


def check_output(path: str | Path, name: str, suffixes: Sequence[str] = ()) -> Path:
    """The path of a file that can be written; its folder is there then, and what was at the path is untouched.

    Raises ArgumentError that names the argument `name` (empty: the path alone).
    """
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        *others, last = suffixes
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise ArgumentError(f"{_named(path, name)} must end in {wanted}", **_value(path, name))
    if os.path.isdir(path):  # pathlib's would raise where the folder may not be looked into
        raise _refused(path, name, "it is a folder; name a file in it")
    there = os.path.exists(path)
    if there and not os.path.isfile(path):
        raise _refused(path, name, "it is a device or a pipe; name a file")
    if there and not os.access(path, os.W_OK):
        raise _refused(path, name, "it is there and read-only; give another name")
    _try(path.parent, path, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def check_folder(path: str | Path, name: str) -> Path:
    """The path of a folder in which files can be written; one that was not there is not there after this either.

    Raises ArgumentError that names the argument `name`."""
    _try(Path(path), Path(path), name)
    return Path(path)


def check_room(path: str | Path, size: int) -> None:
    """Raises OSError where the disk of the path's folder, which is there, has less than `size` bytes left."""
    path = Path(path)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OSError(f"{path.parent} has {free / 1e9:.2f} GB left, and {path.name} takes {size / 1e9:.2f} GB")


@contextlib.contextmanager
def unfinished(path: str | Path, *, shared: bool = False) -> Iterator[Path]:
    """A name beside `path` that becomes `path` if the block ends well, else it goes. Makes the folder.

    shared: others may write the same file at the same time; each has a name of its own then, and the last one's stays.
    What is killed leaves such names behind, where without it the next one takes the same name: so not for large files.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _own_name(path) if shared else path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_first(path: str | Path, text: str) -> bool:
    """Whether there was no file and now is one with this text: of several who write at the same time, one does. Nobody
    sees it half written. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _own_name(path)
    try:
        new.write_text(text)
        try:
            os.link(new, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return _write_new(path, text)
        return True
    finally:
        new.unlink(missing_ok=True)


def _write_new(path: Path, text: str) -> bool:
    try:
        with open(path, "x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _own_name(path: Path) -> Path:
    """Nobody else's, and short whatever the file is called: names have 255 bytes at most."""
    return path.with_name(f".rcm_jax_{secrets.token_hex(6)}.part{path.suffix}")


def _try(folder: Path, path: Path, name: str) -> None:
    """Makes the folder and a file in it, and removes both again, but for what was there."""
    lineage = (folder, *folder.parents)
    missing = [f for f in lineage if not os.path.exists(f)]
    there = next(f for f in lineage if os.path.exists(f))
    if not there.is_dir():
        raise _refused(path, name, f"{there} is a file; name a folder that is one, or is not there yet")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".rcm_jax_") as tried:
            tried.write(bytes(BLOCK))
            tried.flush()
    except OSError as error:
        advice = "give a path on a disk and in a folder where you may write"
        raise _refused(
            path, name, f"nothing can be written in {folder} ({error.strerror or error}); {advice}"
        ) from None
    finally:
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()


def _refused(path: Path, name: str, why: str) -> ArgumentError:
    return ArgumentError(f"cannot write {_named(path, name)}: {why}", **_value(path, name))


def _named(path: Path, name: str) -> str:
    return f"{{{name}}}" if name else str(path)


def _value(path: Path, name: str) -> dict[str, Path]:
    return {name: path} if name else {}
