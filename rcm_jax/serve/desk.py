"""Who may come in: so many streams at a time, the others one behind the other, and no more than that."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable

from rcm_jax.serve import metrics


class Full(Exception):
    """Nobody more may wait."""


class Desk:
    """Of the event loop's own thread."""

    def __init__(self, streams: int, queue: int):
        self.streams, self.queue, self.active = streams, queue, 0
        self._waiting: deque[tuple[asyncio.Future, Callable[[int], None]]] = deque()

    @contextlib.asynccontextmanager
    async def place(self, tell: Callable[[int], None]) -> AsyncIterator[None]:
        """Around a stream. tell: hears how many are before this one, whenever that changes. Raises Full."""
        await self._enter(tell)
        metrics.STREAMS.set(self.active)
        try:
            yield
        finally:
            self._leave()
            metrics.STREAMS.set(self.active)

    async def _enter(self, tell: Callable[[int], None]) -> None:
        if self.active < self.streams and not self._waiting:
            self.active += 1
            return
        if len(self._waiting) >= self.queue:
            raise Full(f"all {self.streams} streams are taken, and {self.queue} readers wait")
        mine = asyncio.get_running_loop().create_future(), tell
        self._waiting.append(mine)
        self._tell()
        try:
            await mine[0]  # the place is given by who leaves
        except asyncio.CancelledError:
            if mine in self._waiting:
                self._waiting.remove(mine)
                self._tell()
            elif not mine[0].cancelled():
                self._leave()
            raise

    def _leave(self) -> None:
        self.active -= 1
        while self._waiting and self.active < self.streams:
            future, _ = self._waiting.popleft()
            if not future.done():
                self.active += 1
                future.set_result(None)
        self._tell()

    def _tell(self) -> None:
        metrics.WAITING.set(len(self._waiting))
        for place, (_, tell) in enumerate(self._waiting):
            tell(place)
