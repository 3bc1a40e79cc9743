"""One reader's video, as the engine has it: what was asked for, what is under way, and where it goes."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from rcm_jax.media.pictures import enlarge
from rcm_jax.pipelines.live import Live, Pushed
from rcm_jax.serve import metrics, wire
from rcm_jax.serve.fragments import Fragments
from rcm_jax.worlds.painted import Painted, checked

UNDER_WAY = 2  # chunks of one show between the network and the encoder
Deliver = Callable[[str | bytes], None]  # from any thread; never waits


class Show:
    """deliver: takes what the reader gets, text and binary, in order; empty bytes are the end. changed: called where
    the engine should look again. What a reader does may come from any thread, and returns at once."""

    def __init__(self, opening: wire.Open, deliver: Deliver, changed: Callable[[], None]):
        self.opening, self.deliver, self.changed = opening, deliver, changed
        self.live: Live | None = None  # the engine's thread makes it, with these options
        self.options: dict[str, Any] = {}
        self.failed: BaseException | None = None
        self.pushed = Pushed() if opening.video else None
        self.words: deque[wire.Say | wire.Change] = deque()
        self.allowed, self.made, self.encoded = min(opening.more, wire.MAX_AHEAD), 0, 0
        self.paused = self.closed = self.prepares = False
        self.asked_for = 0  # frames of input
        self.begun = self.heard = time.monotonic()
        self._fragments: Fragments | None = None
        self._encoder = ThreadPoolExecutor(1, "encodes")
        self._lock = threading.Lock()

    # --- what the reader does -----------------------------------------------------------------------------------------

    def hear(self, word: wire.Word) -> None:
        """Raises BadMessage for what cannot be said now."""
        self.heard = time.monotonic()
        match word:
            case wire.Open():
                raise wire.BadMessage("the stream is open already")
            case wire.Say() | wire.Change():
                if len(self.words) >= 16:
                    raise wire.BadMessage("too many changes wait for the next chunk")
                self.words.append(word)
            case wire.More(chunks=chunks):
                if chunks > self.encoded + wire.MAX_AHEAD:
                    raise wire.BadMessage(f"chunks must be at most {wire.MAX_AHEAD} more than have come")
                self.allowed = max(self.allowed, chunks)
            case wire.Pause(on=on):
                self.paused = on
            case wire.NoMoreVideo():
                self._input().close()
            case wire.Close():
                self.closed = True
        self.changed()

    def push(self, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        """A frame of input. Raises BadMessage for one that was not asked for."""
        self.heard = time.monotonic()
        pushed = self._input()
        with self._lock:
            if self.asked_for <= 0:
                raise wire.BadMessage("a frame that was not wanted: wait for `want`")
            self.asked_for -= 1
        pushed.push(frame)
        self.changed()

    def _input(self) -> Pushed:
        if self.pushed is None:
            raise wire.BadMessage("the stream was opened without video")
        return self.pushed

    # --- what the engine asks and does --------------------------------------------------------------------------------

    @property
    def runnable(self) -> bool:
        """Whether its next chunk can be made now."""
        due = self.made < self.allowed and self.made - self.encoded < UNDER_WAY
        return due and not self.paused and not self.closed and self._has_input()

    def _has_input(self) -> bool:
        with self._lock:
            wanted = self.live.wanted
            if wanted > self.asked_for:
                self.asked_for = wanted
                self.deliver(wire.event("want", frames=wanted))
            return wanted == 0

    def show(self, part: Painted, begun: float) -> None:
        """A chunk that is on its way: encoded and delivered by a thread of its own, after the one before it."""
        self._encoder.submit(self._encode, part, self.made, self.live.prompt, begun)
        self.made += 1

    def _encode(self, part: Painted, index: int, prompt: str, begun: float) -> None:
        if self.failed is not None:
            return
        try:
            frames = checked(part, f"frames of chunk {index}")[0]
            frames = enlarge(frames, self.live.pipe.world.scale)
            if self._fragments is None:
                self._open(frames.shape[2], frames.shape[1])
            start, encoder = self._fragments.frames / self._fragments.fps, self._fragments
            data, now, used = encoder.part(frames), time.monotonic(), memory()
            self.deliver(wire.event(
                "chunk", index=index, start=start, seconds=len(frames) / encoder.fps, prompt=prompt,
                latency=now - begun, memory=used,
            ))  # fmt: skip
            self.deliver(data)
            self.encoded += 1
            if index == 0:
                metrics.FIRST.observe(now - self.begun)
            metrics.CHUNK.observe(now - begun)
            metrics.CHUNKS.inc()
            metrics.FRAMES.inc(len(frames))
            metrics.BYTES.inc(len(data))
            metrics.MEMORY.set(used)
        except BaseException as error:  # the engine ends this stream, and no other
            self.failed, self.closed = error, True
        self.changed()

    def _open(self, width: int, height: int) -> None:
        live = self.live
        self._fragments = Fragments((width, height), live.pipe.world.fps)
        self.deliver(wire.event(
            "opened", mime=self._fragments.mime, width=width, height=height, fps=live.pipe.world.fps,
            chunk_frames=live.chunk_frames, prompt=live.prompt, **live.settings,
        ))  # fmt: skip

    def end(self, why: str, *, wrong: bool = False) -> None:
        """The last word, after what is still being encoded; then nothing of it is left on the device."""
        self.closed = True

        def last() -> None:
            self.deliver(wire.event("end", why=why, wrong=wrong))
            self.deliver(b"")
            if self._fragments is not None:
                self._fragments.close()
            # reader and show know each other: what is large goes now, not when the collector finds the two
            self._fragments = self.live = self.deliver = None

        if self.live is not None:
            self.live.close()
        self._encoder.submit(last)
        self._encoder.shutdown(wait=False)


def memory() -> int:
    """Bytes in use: the device's, or where it does not tell, this process's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_in_use" in stats:
        return stats["bytes_in_use"]
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0
