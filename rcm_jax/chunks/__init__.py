"""Chunk patterns of causal video, and who sees whom; `python -m rcm_jax.chunks` draws it.

A causal network makes a video in chunks of latent frames. `c1-4` is a first chunk of one frame, then chunks of four.
Inside a chunk attention is full; across chunks there are two masks (arXiv 2606.25473):

block_causal        a chunk sees the chunks up to its own
teacher_forcing     on the packed sequence [clean | noisy]: a clean chunk sees the clean chunks up to its own, a noisy
                    one the clean chunks before its own, and itself

A window of n keeps the last n chunks, the current one included; a sink of s keeps the first s for good.
"""

import dataclasses
import re

from jaxtyping import Array, Int

from rcm_jax.kernels.masks import KeyRuns, Run

ChunkIndex = Int[Array, ""] | int
Spans = tuple[Run, ...]  # first and one past the last latent frame of every chunk


@dataclasses.dataclass(frozen=True)
class ChunkPattern:
    """A first chunk of `first` latent frames, then chunks of `rest`."""

    first: int
    rest: int

    def __post_init__(self) -> None:
        if self.first < 1 or self.rest < 1:
            raise ValueError(f"chunk pattern {self}: both sizes must be at least 1 latent frame")

    def __str__(self) -> str:
        return f"c{self.first}-{self.rest}"

    @classmethod
    def parse(cls, text: str) -> "ChunkPattern":
        """From "c1-4". Raises ValueError for anything else."""
        match = re.fullmatch(r"c(\d+)-(\d+)", text)
        if match is None:
            raise ValueError(f"chunk pattern {text!r} must be like 'c1-4': latent frames of the first and other chunks")
        return cls(int(match[1]), int(match[2]))

    def fits(self, frames: int) -> bool:
        return frames >= self.first and (frames - self.first) % self.rest == 0

    def start(self, chunk: ChunkIndex) -> ChunkIndex:
        """The first latent frame of a chunk."""
        return (chunk > 0) * (self.first + (chunk - 1) * self.rest)

    def spans(self, frames: int) -> Spans:
        """The chunks of a video of so many latent frames. Raises ValueError listing the patterns that fit it."""
        if not self.fits(frames):
            sizes = range(1, frames + 1)
            fitting = [
                str(ChunkPattern(a, b)) for a in sizes for b in sizes if a <= b and ChunkPattern(a, b).fits(frames)
            ]
            raise ValueError(
                f"chunk pattern {self} does not fit {frames} latent frames; these do: {', '.join(fitting)}"
            )
        starts = (0, *range(self.first, frames, self.rest))
        return tuple(zip(starts, (*starts[1:], frames), strict=True))


def check_window(window: int | None, sink: int) -> None:
    """Raises ValueError unless the window (None: all chunks) has room for the sink and the current chunk."""
    if sink < 0 or (window is not None and window < 1):
        raise ValueError(f"{window=} must be None or at least 1 chunk, and {sink=} at least 0")
    if window is not None and window < sink:
        raise ValueError(f"{window=} is smaller than {sink=}: the window, in chunks, must be at least as long")


def _seen(chunk: int, window: int | None, sink: int) -> list[Run]:
    """Ranges of chunks up to `chunk` that it sees, the last of them ending with itself."""
    first = 0 if window is None else max(0, chunk + 1 - window)
    return [(0, chunk + 1)] if first <= sink else [(0, sink), (first, chunk + 1)][sink == 0 :]


def _tokens(spans: Spans, chunks: Run, frame_tokens: int) -> Run:
    return spans[chunks[0]][0] * frame_tokens, spans[chunks[1] - 1][1] * frame_tokens


def block_causal(spans: Spans, frame_tokens: int, *, window: int | None = None, sink: int = 0) -> KeyRuns:
    """The mask of a sequence of chunks; `frame_tokens` tokens a latent frame."""
    check_window(window, sink)
    ends = tuple(end * frame_tokens for _, end in spans)
    seen = [_seen(chunk, window, sink) for chunk in range(len(spans))]
    return KeyRuns(ends, tuple(tuple(_tokens(spans, r, frame_tokens) for r in runs) for runs in seen))


def teacher_forcing(spans: Spans, frame_tokens: int, *, window: int | None = None, sink: int = 0) -> KeyRuns:
    """The mask of the packed sequence [clean | noisy], both halves in the same chunks."""
    clean = block_causal(spans, frame_tokens, window=window, sink=sink)
    length = clean.query_ends[-1]
    noisy = []
    for chunk, (start, end) in enumerate(spans):
        before = [(a, min(b, chunk)) for a, b in _seen(chunk, window, sink)]
        runs = [_tokens(spans, r, frame_tokens) for r in before if r[0] < r[1]]
        noisy.append((*runs, (length + start * frame_tokens, length + end * frame_tokens)))
    return KeyRuns((*clean.query_ends, *(length + end for end in clean.query_ends)), (*clean.runs, *noisy))
