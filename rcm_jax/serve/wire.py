"""What readers and the server say to each other: JSON over a WebSocket, with parts of video as binary messages.

A reader's words are dataclasses here; `read` makes them of a message, `documented` tells what there is. What the server
says is an `event`: an object with one of these types.
"""

import contextlib
import dataclasses
import json
import types
import typing
from typing import Any

MAX_AHEAD = 8  # chunks that a reader may ask for before it has had them


class BadMessage(ValueError):
    """What was said is none of what may be said. The message says what would be right."""


# --- what readers say -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of `SamplingOptions`: those that may change while a stream plays."""

    seed: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    cache_policy: str | None = None
    noise_scale: float | None = None
    noise_rule: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Open(Settings):
    """The first word: a stream of this prompt. more: chunks that may come at once. video: frames follow as binary
    messages, JPEG, PNG or WebP, as many as `want` asks for. The others as `python -m rcm_jax.sample_causal` has them;
    what is not given is as the server was started."""

    prompt: str | None = None
    prompt_blend: int | None = None
    video: bool = False
    more: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Say:
    """Another prompt from the next chunk on; cut: with a new scene, where the cache policy has cuts."""

    prompt: str
    cut: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change(Settings):
    """Other settings from the next chunk on. But for the seed and the steps they begin the video anew."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pause:
    """on: no chunk is made until it is off again."""

    on: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class More:
    """Chunks may be made up to this number, counted from the stream's begin: the server makes none that nobody has
    asked for."""

    chunks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoMoreVideo:
    """The input video has ended; so does the stream, after its last whole chunk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Close:
    """The stream ends."""


WORDS = {
    "open": Open, "say": Say, "change": Change, "pause": Pause, "more": More, "no_more_video": NoMoreVideo,
    "close": Close,
}  # fmt: skip
Word = Open | Say | Change | Pause | More | NoMoreVideo | Close


def read(text: str) -> Word:
    """Raises BadMessage, which quotes little of what was sent."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise BadMessage("a message must be JSON, or a frame of video in binary") from None
    if not isinstance(said, dict) or not isinstance(said.get("type"), str) or said["type"] not in WORDS:
        raise BadMessage(f'a message must be an object whose "type" is one of {", ".join(WORDS)}')
    return made(said)


def made(said: dict[str, Any]) -> Word:
    """Of an object with a type that there is. Raises BadMessage."""
    said = dict(said)
    kind = WORDS[said.pop("type")]
    hints = typing.get_type_hints(kind)
    if unknown := [name for name in said if name not in hints]:
        raise BadMessage(f"{_short(unknown[0])} is nothing of that message; there are {', '.join(hints) or 'none'}")
    for name, value in said.items():
        if not _is(value, hints[name]):
            raise BadMessage(f"{name} must be {_spelled(hints[name])}, not {_short(value)}")
    missing = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.name not in said]
    if missing:
        raise BadMessage(f"{missing[0]} is missing")
    return kind(**said)


def opening(query: dict[str, str]) -> Open:
    """Of an address's query. Raises BadMessage."""
    hints, said = typing.get_type_hints(Open), {}
    for name, value in query.items():
        said[name] = value
        for kind in (int, float):
            if kind in _kinds(hints.get(name, str)):
                with contextlib.suppress(ValueError):  # `made` tells what it must be
                    said[name] = kind(value)
    return made({"type": "open"} | said)


def written(word: Word) -> str:
    """What `read` reads."""
    name = next(name for name, kind in WORDS.items() if isinstance(word, kind))
    given = {key: value for key, value in dataclasses.asdict(word).items() if value is not None}
    return json.dumps({"type": name} | given)


def changes(word: Open | Change) -> dict[str, Any]:
    """The options of a video in it that are given."""
    names = (*(field.name for field in dataclasses.fields(Settings)), "prompt_blend")
    return {name: value for name in names if (value := getattr(word, name, None)) is not None}


def _kinds(hint: Any) -> tuple[type, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _is(value: Any, hint: Any) -> bool:
    kinds = _kinds(hint)
    if isinstance(value, bool):  # which is a number, too
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


def _spelled(hint: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return " or ".join(names[kind] for kind in _kinds(hint))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


# --- what the server says ---------------------------------------------------------------------------------------------

EVENTS = {
    "waiting": "place: how many readers are before this one",
    "preparing": "programs for what was asked are compiled; other streams go on, and this one as before",
    "opened": "mime, width, height, fps, chunk_frames (of the first chunk and of the others), prompt, and the settings "
    "as they are",
    "chunk": "index, start and seconds of it in the video, prompt, latency (seconds from the beginning of its making), "
    "memory (bytes); the next message is its video, fragments of an MP4, the first with the file's head",
    "said": "prompt, settings, chunk: the first chunk that is made so",
    "want": "frames of input video that the next chunk waits for",
    "refused": "why what was said cannot be done; the stream goes on as before",
    "end": "why, wrong (whether something failed): there is nothing after it; what has come is a whole file",
}


def event(kind: str, **what: Any) -> str:
    if kind not in EVENTS:
        raise ValueError(f"{kind=} must be one of {', '.join(EVENTS)}")
    return json.dumps({"type": kind} | what)


def documented() -> dict[str, Any]:
    """All of it, for `GET /api`."""
    said = {
        name: {"about": " ".join((kind.__doc__ or "").split()),
               "fields": {key: _spelled(hint) for key, hint in typing.get_type_hints(kind).items()}}
        for name, kind in WORDS.items()
    }  # fmt: skip
    return {"you say": said, "the server says": EVENTS}
