"""Which programs are compiled: nobody's stream waits while those that another reader asks for are."""

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rcm_jax.pipelines.live import TOGETHER, Live, Pushed, advance
from rcm_jax.pipelines.pipeline import Pipeline

OF_A_VIDEO = ("seed",)  # options that change no program


class Programs:
    """most: streams in a pass. changed: called when more programs are there."""

    def __init__(self, pipe: Pipeline, most: int, changed: Callable[[], None]):
        self._pipe, self._most, self._changed = pipe, most, changed
        self._sizes: dict[Hashable, tuple[int, ...]] = {}  # of passes, largest first
        self._asked: set[tuple[Hashable, int]] = set()
        self._failed: dict[Hashable, Exception] = {}
        self._compiler = ThreadPoolExecutor(1, "compiles")
        self.compiling = False  # whether a program is on its way, which cannot be stopped

    def key(self, options: dict[str, Any], video: bool) -> Hashable:
        """Equal for streams that may be made together."""
        return video, *sorted((name, repr(value)) for name, value in options.items() if name not in OF_A_VIDEO)

    def ready(self, options: dict[str, Any], *, video: bool) -> bool:
        """Whether a stream with these options can go on at once; else they are being compiled. Raises what they are
        refused for."""
        key = self.key(options, video)
        if key in self._failed:
            raise self._failed.pop(key)
        if key not in self._sizes:
            self._ask(key, options, video, 1)
        return key in self._sizes

    def sizes(self, key: Hashable, options: dict[str, Any], count: int) -> tuple[int, ...]:
        """How many streams may be in a pass. More than there are so far are compiled beside them."""
        have = self._sizes[key]
        larger = [n for n in TOGETHER if have[0] < n <= min(count, self._most)]
        if larger and self._pipe.opened.experts.mesh.size == 1:
            self._ask(key, options, key[0], larger[0])
        return have

    def compile(self, options: dict[str, Any], *, video: bool, count: int = 1) -> None:
        """Runs what a stream of these options runs: its first chunks, and a change of the prompt."""
        lives = [self._live(options, video) for _ in range(count)]
        try:
            for _ in range(2):
                for part in advance(lives, (count, 1)):
                    if isinstance(part, Exception):
                        raise part
                    np.asarray(part.frames)
                lives[0].say(lives[0].prompt)
        finally:
            for live in lives:
                live.close()
        key = self.key(options, video)
        self._sizes[key] = tuple(sorted({count, *self._sizes.get(key, (1,))}, reverse=True))

    def close(self) -> None:
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _live(self, options: dict[str, Any], video: bool) -> Live:
        pushed = Pushed() if video else None
        live = Live(self._pipe, None, pushed=pushed, **options)
        if video:
            width, height = live.size
            for _ in range(sum(live.chunk_frames)):
                pushed.push(np.zeros((height, width, 3), np.uint8))
        return live

    def _ask(self, key: Hashable, options: dict[str, Any], video: bool, count: int) -> None:
        if (key, count) not in self._asked:
            self._asked.add((key, count))
            self._compiler.submit(self._compile, key, options, video, count)

    def _compile(self, key: Hashable, options: dict[str, Any], video: bool, count: int) -> None:
        self.compiling = True
        try:
            self.compile(options, video=video, count=count)
        except Exception as error:
            if count == 1:
                self._asked.discard((key, count))
                self._failed[key] = error
        finally:
            self.compiling = False
        self._changed()
