"""Writing a network: ours or theirs, in a stream, whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from rcm_jax.convert.orbax_io import write_orbax
from rcm_jax.convert.safetensors_io import write_safetensors
from rcm_jax.convert.tensors import Tensor, total_bytes
from rcm_jax.model_file import FORMAT, ORBAX_INFO, ModelInfo


@contextlib.contextmanager
def unfinished(path: Path, size: int, *, overwrite: bool) -> Iterator[Path]:
    """A name beside `path` to write to, file or folder; it becomes `path` when the block ends well, else it goes.

    Raises FileExistsError where there is something at `path` already and `overwrite` is not set, or a folder of other
    things, and OSError where the disk has less than `size` bytes left or cannot be written; nothing is changed then.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; --overwrite replaces it")
    if path.is_dir() and not any((path / name).is_file() for name in (ORBAX_INFO, "config.json")):
        raise FileExistsError(f"{path} is a folder, and not one of a network: it is not replaced")
    new = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(new)
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise OSError(f"{path.parent} has {free / 1e9:.2f} GB left, and {path.name} takes {size / 1e9:.2f} GB")
        yield new
        if path.exists() and (path.is_dir() or new.is_dir()):
            old = path.with_name(path.name + ".old")
            os.replace(path, old)
            os.replace(new, path)
            _remove(old)
        else:
            os.replace(new, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            _remove(new)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def progress(what: str, size: int) -> Iterator[Callable[[int], object]]:
    """A bar of bytes, shown when it takes over two seconds."""
    with tqdm(desc=what, total=size, unit="B", unit_scale=True, delay=2, leave=False) as bar:
        yield bar.update


def write_model(
    path: Path, tensors: Mapping[str, Tensor], info: ModelInfo, *, format: str = "safetensors", overwrite: bool = False
) -> None:
    """Our model file, or for format "orbax" our checkpoint folder. Memory holds one layer at a time.

    `rcm_jax.model_file.load_model` reads both. Raises as `unfinished`.
    """
    size = total_bytes(tensors)
    with unfinished(path, size, overwrite=overwrite) as new, progress(path.name, size) as advance:
        if format == "orbax":
            write_orbax(new, tensors, info, advance)
        else:
            write_safetensors(new, tensors, {"format": FORMAT, "info": info.to_json()}, advance)
