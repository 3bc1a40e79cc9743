"""Bytes of files, here or at any address that fsspec knows. Nothing is held open between reads, so any number of
threads may read, and a set of any number of shards takes no descriptors.

    size("s3://bucket/set/shard-000000.tar")          read("/data/set/shard-000000.tar", 0, 512)

A server that does not answer within `PATIENCE` seconds is asked again, `TRIES` times in all.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

PATIENCE = 60.0
TRIES = 3
PAUSE = 1.0  # seconds before the second request; each further one waits twice as long

T = TypeVar("T")


def is_remote(address: str) -> bool:
    return "://" in address or "::" in address


def size(address: str) -> int:
    """Raises FileNotFoundError where there is no file, OSError where its place does not answer."""
    if not is_remote(address):
        return os.stat(address).st_size
    return int(_ask(address, lambda system, path: system.info(path)["size"]))


def version(address: str) -> str:
    """What changes when the file at an address does, as far as its place tells."""
    return _ask(address, lambda system, path: system.ukey(path))


def read(address: str, start: int = 0, stop: int | None = None) -> bytearray | bytes:
    """Those bytes, or all of a small file. Raises as `size`, and OSError where fewer came than were asked for."""
    if is_remote(address):
        found = _ask(address, lambda system, path: system.cat_file(path, start=start, end=stop), (start, stop))
    else:
        stop = os.stat(address).st_size if stop is None else stop
        found = bytearray(stop - start)
        with open(address, "rb", buffering=0) as file:
            file.seek(start)
            view = memoryview(found)
            while view and (count := file.readinto(view)):
                view = view[count:]
            found = found[: len(found) - len(view)] if view else found
    if stop is not None and len(found) != stop - start:
        raise OSError(f"{address}: bytes {start} to {stop} were asked for, and {len(found)} came: did the file change?")
    return found


def names(folder: str) -> dict[str, str]:
    """The files of a folder: addresses by names. Raises FileNotFoundError where there is no such folder."""
    if not is_remote(folder):
        root = Path(folder)
        return {path.name: str(path) for path in root.iterdir() if path.is_file()}

    def listed(system: Any, path: str) -> dict[str, str]:
        return {name.rstrip("/").rpartition("/")[2]: system.unstrip_protocol(name) for name in system.ls(path, False)}

    return _ask(folder, listed)


def _ask(address: str, request: Callable[[Any, str], T], part: tuple[int, int | None] | None = None) -> T:
    """What a file system answers to a request, asked again where it stalls or fails."""
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # of a protocol that is unknown, or whose package is not here
        raise ValueError(f"{address} cannot be opened: {error}") from error
    wanted = None if part is None or part[1] is None else part[1] - part[0]
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            found = _within(PATIENCE, lambda: request(system, path))
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each file system has kinds of its own
            why = error
            continue
        if wanted is None or len(found) == wanted:
            return found
        why = OSError(f"{len(found)} of {wanted} bytes came")
    words = f"no answer within {PATIENCE:g} s" if isinstance(why, TimeoutError) else f"{type(why).__name__}: {why}"
    raise OSError(f"{address} cannot be read: {words}; asked {TRIES} times") from why


def _within(seconds: float, function: Callable[[], T]) -> T:
    """What the function gives, or TimeoutError; a call that hangs is left to its thread, which the process ends."""
    box: dict[str, Any] = {}

    def call() -> None:
        try:
            box["value"] = function()
        except BaseException as error:  # raised again where it is waited for
            box["error"] = error

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in box:
        raise box["error"]
    if "value" not in box:
        raise TimeoutError
    return box["value"]
