"""A server's streams from Python.

    with open_stream("http://127.0.0.1:8000", prompt="a red circle moving left") as stream:
        for part in stream:
            file.write(part.video)               # fragments of one MP4
            if part.index == 8:
                stream.say("a blue square moving up")

One chunk after the other comes as it is asked for: a loop that takes its time holds the server back, and nothing piles
up. `stream.opened` says what plays; `stream.said` what was answered.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from jaxtyping import UInt8
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from rcm_jax.serve import wire


class StreamEnded(RuntimeError):
    """The server ended a stream because something was wrong."""


class Refused(ValueError):
    """What was asked for cannot be done; the stream goes on as before."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A chunk. start, seconds: where it is in the video. latency: seconds that it took to make. memory: bytes that the
    server uses. video: fragments of an MP4, the first with its head."""

    index: int
    start: float
    seconds: float
    prompt: str
    latency: float
    memory: int
    video: bytes


class Stream:
    """Iterate over it for `Part`s until it ends. opened: mime, width, height, fps and settings, from the first part on.
    place: how many readers are before this one, while it waits."""

    def __init__(self, socket: ClientConnection, opening: wire.Open, closing: contextlib.ExitStack):
        self._socket, self._ahead, self._got, self._closing = socket, max(1, opening.more), 0, closing
        self.opened: dict[str, Any] = {}
        self.said: list[dict[str, Any]] = []
        self.why: str | None = None  # it ended
        self.place: int | None = None
        self.wanted = 0  # frames of input
        self._send(opening)

    def __iter__(self) -> Iterator[Part]:
        while (part := self.next()) is not None:
            yield part

    def next(self, timeout: float | None = None) -> Part | None:
        """The next chunk; None at the end. Raises StreamEnded for a wrong one, Refused for what was said and cannot be,
        TimeoutError. Returns also None where frames are `wanted`."""
        while self.why is None:
            said = json.loads(self._heard(timeout))
            kind = said.pop("type")
            if kind == "chunk":
                video = self._heard(timeout)
                self._got += 1
                with contextlib.suppress(ConnectionClosed):  # what has come before the end is still to be read
                    self._send(wire.More(chunks=self._got + self._ahead))
                return Part(video=video, **said)
            if kind == "end":
                self.why = said["why"]
                if said["wrong"]:
                    raise StreamEnded(self.why)
            elif kind == "refused":
                raise Refused(said["why"])
            elif kind == "waiting":
                self.place = said["place"]
            elif kind == "want":
                self.wanted = said["frames"]
                return None
            elif kind == "opened":
                self.opened, self.place = said, None
            elif kind == "said":
                self.said.append(said)
        return None

    def say(self, prompt: str, *, cut: bool = False) -> None:
        """From the next chunk that is made on."""
        self._send(wire.Say(prompt=prompt, cut=cut))

    def change(self, **settings: Any) -> None:
        """Any of `wire.Change`'s fields."""
        self._send(wire.Change(**settings))

    def pause(self, on: bool = True) -> None:
        self._send(wire.Pause(on=on))

    def push(self, picture: bytes | UInt8[np.ndarray, "H W 3"]) -> None:
        """A frame of input, of those that are `wanted`."""
        self._socket.send(picture if isinstance(picture, bytes) else _png(picture))
        self.wanted = max(0, self.wanted - 1)

    def end_input(self) -> None:
        """There are no more frames; the stream ends with them."""
        self._send(wire.NoMoreVideo())

    def close(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            self._send(wire.Close())
        self._closing.close()

    def abandon(self) -> None:
        """Goes without a word, as a reader does whose network breaks."""
        self._socket.socket.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _heard(self, timeout: float | None) -> str | bytes:
        try:
            return self._socket.recv(timeout)
        except ConnectionClosed as error:
            self.why = str(error)
            raise StreamEnded(f"the connection was closed: {error}") from error

    def _send(self, word: wire.Word) -> None:
        self._socket.send(wire.written(word))


def open_stream(url: str = "http://127.0.0.1:8000", *, token: str | None = None, **opening: Any) -> Stream:
    """A stream of a server that runs there. opening: fields of `wire.Open`. A token may also be in the address."""
    parts = urlsplit(url)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    address = urlunsplit((scheme, parts.netloc, f"{parts.path.rstrip('/')}/api/stream", parts.query, ""))
    with contextlib.ExitStack() as closing:
        socket = closing.enter_context(connect(address, additional_headers=headers, max_size=None, compression=None))
        return Stream(socket, wire.Open(**opening), closing.pop_all())


def _png(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()
