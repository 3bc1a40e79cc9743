"""What a user sees while nothing else moves: how far, how long, and what is waited for."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from tqdm import tqdm

PATIENCE = 3.0  # seconds without a word


@contextlib.contextmanager
def waiting(what: str, after: float = PATIENCE) -> Iterator[None]:
    """Says on stderr what is waited for, if the block takes longer than `after` seconds: on a terminal with the time so
    far, else in one line. An empty `what` says nothing."""
    done = threading.Event()

    def tell() -> None:
        if done.wait(after):
            return
        if not sys.stderr.isatty():
            tqdm.write(f"{what} …", file=sys.stderr)
            return
        with tqdm(desc=f"{what} …", bar_format="{desc} {elapsed}", initial=after, leave=False) as line:
            line.start_t -= after
            while not done.wait(1):
                line.refresh()

    teller = threading.Thread(target=tell, daemon=True)
    if what:
        teller.start()
    try:
        yield
    finally:
        done.set()
        if what:
            teller.join()


class Progress:
    """A bar of `total` units with the time left, and while the first is on its way, that it compiles.

    with Progress("sample", total=4, unit="step") as progress:
        ...
        progress.update()

    limit: seconds. As soon as two units show that the rest takes longer, `update` raises TimeoutError.
    An empty `what` shows nothing. delay: seconds before the bar appears.
    """

    def __init__(self, what: str, total: int, unit: str, *, limit: float | None = None, delay: float = 0):
        self._bar = tqdm(desc=what, total=total, unit=unit, delay=delay, leave=False, disable=not what)
        self._first = contextlib.ExitStack()
        self._words = f"{what}: compiling, and the first {unit}" if what else ""
        self.total, self.unit, self.limit, self.done, self._began = total, unit, limit, 0, 0.0

    def __enter__(self) -> "Progress":
        self._first.enter_context(waiting(self._words))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._first.close()
        self._bar.close()

    def update(self) -> None:
        self._first.close()
        self._bar.update()
        self.done += 1
        now = time.monotonic()
        if self.done == 1:
            self._began = now
            return
        left = (now - self._began) / (self.done - 1) * (self.total - self.done)
        if self.limit is not None and left > self.limit:
            raise TimeoutError(
                f"after {self.unit} {self.done} of {self.total} about {in_words(left)} are left, more than "
                f"{in_words(self.limit)}"
            )


@contextlib.contextmanager
def byte_bar(what: str, size: int) -> Iterator[Callable[[int], object]]:
    """A bar of bytes, shown when it takes over two seconds; gives what is called with the bytes that are done."""
    with tqdm(desc=what, total=size, unit="B", unit_scale=True, delay=2, leave=False) as bar:
        yield bar.update


def in_words(seconds: float) -> str:
    """ "1.5 hours", "20 minutes", "3 seconds"."""
    size, name = next((s, n) for s, n in ((3600, "hour"), (60, "minute"), (1, "second")) if seconds >= s or s == 1)
    count = f"{seconds / size:.2g}" if seconds < 10 * size else f"{seconds / size:.0f}"
    return f"{count} {name}{'s' * (count != '1')}"
