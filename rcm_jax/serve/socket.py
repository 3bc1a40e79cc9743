"""A reader's WebSocket: what it says goes to its show, what the show makes goes out, and no more than is wanted."""

import asyncio
import contextlib
import io
import time
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from starlette.websockets import WebSocket, WebSocketDisconnect

from rcm_jax.media.clips import covering
from rcm_jax.serve import metrics, wire
from rcm_jax.serve.desk import Desk, Full
from rcm_jax.serve.engine import Engine
from rcm_jax.serve.options import ServeOptions
from rcm_jax.serve.show import Show

NORMAL, POLICY, LATER = 1000, 1008, 1013  # codes of a WebSocket's end
PATIENCE = 10.0  # seconds for the first word
MISTAKES = 20  # of one reader
MAX_PIXELS = 16 << 20  # of a frame


class Leaves(Exception):
    """The reader is gone, or is sent away: with a code and a reason."""

    def __init__(self, code: int = NORMAL, why: str = ""):
        self.code, self.why = code, why


class Reader:
    """One connection, from its first word to its end."""

    def __init__(self, socket: WebSocket, engine: Engine, desk: Desk):
        self.socket, self.engine, self.desk, self.limits = socket, engine, desk, engine.limits
        self.show: Show | None = None
        self._out: asyncio.Queue[str | bytes] = asyncio.Queue()  # at most what was asked for, and a few words
        self._opening: asyncio.Future[wire.Open] = asyncio.get_running_loop().create_future()
        self._over = asyncio.Event()
        self._loop, self._mistakes, self._rate = asyncio.get_running_loop(), 0, Rate(engine.limits.messages)

    async def serve(self) -> None:
        """Returns when it is over. Whatever happens, the show is closed then."""
        await self.socket.accept()
        hears, shows = asyncio.create_task(self._hear()), asyncio.create_task(self._show())
        sends = asyncio.create_task(self._send())
        try:
            done, _ = await asyncio.wait({hears, shows, sends}, return_when=asyncio.FIRST_COMPLETED)
            if shows in done and shows.exception() is None:  # all is said but for what is still on its way
                await asyncio.wait({hears, sends}, return_when=asyncio.FIRST_COMPLETED)
            ended = next((t.exception() for t in (hears, shows, sends) if t.done() and t.exception()), Leaves())
        finally:
            for task in (hears, shows, sends):
                task.cancel()
            await asyncio.gather(hears, shows, sends, return_exceptions=True)
            self.show = None
        code, why = (ended.code, ended.why) if isinstance(ended, Leaves) else (NORMAL, "")
        if code != NORMAL:
            metrics.REFUSALS.labels(why).inc()
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError):
            if why:
                await self.socket.send_text(wire.event("end", why=why, wrong=True))
            await self.socket.close(code)
        if not isinstance(ended, Leaves | WebSocketDisconnect | OSError):
            raise ended

    # --- three tasks --------------------------------------------------------------------------------------------------

    async def _hear(self) -> None:
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                raise Leaves
            try:
                if message.get("text") is not None:
                    await self._word(message["text"])
                else:
                    await self._frame(message["bytes"])
            except wire.BadMessage as error:
                self._mistakes += 1
                self._out.put_nowait(wire.event("refused", why=str(error)))
                if self._mistakes >= MISTAKES:
                    raise Leaves(POLICY, "too many messages that mean nothing") from None

    async def _show(self) -> None:
        try:
            opening = await asyncio.wait_for(self._opening, PATIENCE)
        except TimeoutError:
            raise Leaves(POLICY, f"nothing was asked for in {PATIENCE:g} seconds") from None
        try:
            async with self.desk.place(lambda place: self._out.put_nowait(wire.event("waiting", place=place))):
                self.show = self.engine.open(opening, self._deliver)
                try:
                    await self._over.wait()
                finally:
                    self.show.hear(wire.Close())
        except Full as error:
            raise Leaves(LATER, str(error)) from None

    async def _send(self) -> None:
        while (what := await self._out.get()) != b"":
            await (self.socket.send_text if isinstance(what, str) else self.socket.send_bytes)(what)
        raise Leaves

    # --- what is said -------------------------------------------------------------------------------------------------

    async def _word(self, text: str) -> None:
        await self._rate.wait()
        word = wire.read(text)
        if isinstance(word, wire.Open) and not self._opening.done():
            self.engine.check_prompt(word.prompt)
            self._opening.set_result(word)
        elif self.show is not None:
            self.show.hear(word)
        elif isinstance(word, wire.Close):
            raise Leaves
        elif not self._opening.done():
            raise wire.BadMessage("the first word must be open")

    async def _frame(self, data: bytes) -> None:
        if self.show is None:
            raise wire.BadMessage("a frame before the stream is open")
        size = self.engine.size
        self.show.push(await asyncio.to_thread(picture, data, size, self.limits))

    def _deliver(self, what: str | bytes) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended before the show
            self._loop.call_soon_threadsafe(self._put, what)

    def _put(self, what: str | bytes) -> None:
        self._out.put_nowait(what)
        if what == b"":
            self._over.set()


class Rate:
    """So many messages a second, and as many at once: who says more is held back, not sent away."""

    def __init__(self, rate: float):
        self._rate, self._left, self._at = rate, float(rate), time.monotonic()

    async def wait(self) -> None:
        now = time.monotonic()
        self._left, self._at = min(self._rate, self._left + (now - self._at) * self._rate) - 1, now
        if self._left < 0:
            await asyncio.sleep(-self._left / self._rate)


def picture(data: bytes, size: tuple[int, int], limits: ServeOptions) -> UInt8[np.ndarray, "H W 3"]:
    """A frame as the network takes it, cut to its proportions. Raises BadMessage for what is none."""
    if len(data) > limits.max_frame:
        raise wire.BadMessage(f"a frame of {len(data)} bytes; at most {limits.max_frame} are taken")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise wire.BadMessage(f"a frame of {image.width} x {image.height} pixels is too large")
                return covering(np.asarray(image.convert("RGB")), size)
    except wire.BadMessage:
        raise
    except Exception:
        raise wire.BadMessage("a frame must be a JPEG, PNG or WebP picture") from None
