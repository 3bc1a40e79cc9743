"""Chunk patterns of causal video, and who sees whom: python -m rcm_jax.chunks --pattern c1-4 --frames 9 --save mask.png

A causal network makes a video in chunks of latent frames. `c1-4` is a first chunk of one frame, then chunks of four.
Inside a chunk attention is full; across chunks there are two masks (arXiv 2606.25473):

block_causal        a chunk sees the chunks up to its own
teacher_forcing     on the packed sequence [clean | noisy]: a clean chunk sees the clean chunks up to its own, a noisy
                    one the clean chunks before its own, and itself

A window of n keeps the last n chunks, the current one included; a sink of s keeps the first s for good.
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from rcm_jax.kernels.masks import KeyRuns, Run, dense

MASKS = ("block_causal", "teacher_forcing")
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


# --- a picture of a mask ---------------------------------------------------------------------------------------------


def draw(mask: KeyRuns, spans: Spans, frame_tokens: int, path: str | Path, title: str = "") -> Path:
    """Writes a PNG of the mask, one square a pair of tokens, with lines between the chunks."""
    from matplotlib.figure import Figure

    size = mask.query_ends[-1]
    figure = Figure(figsize=(5, 5.3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(dense(mask, size, size), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    ends = [end * frame_tokens for _, end in spans]
    ends += [ends[-1] + end for end in ends if size > ends[-1]]
    for end in ends[:-1]:
        half = size > spans[-1][1] * frame_tokens and end == size // 2
        for line in (axes.axhline, axes.axvline):
            line(end - 0.5, color="black" if half else "grey", linewidth=1.5 if half else 0.5)
    middles = [(a + b) / 2 - 0.5 for a, b in zip((0, *ends), ends, strict=False)]
    names = [str(i % len(spans)) for i in range(len(ends))]
    axes.set(xticks=middles, xticklabels=names, yticks=middles, yticklabels=names, xlabel="keys, by chunk",
             ylabel="queries, by chunk", title=title)  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m rcm_jax.chunks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--pattern", default="c1-4", help="chunk pattern, like c1-1, c3-3, c1-4 (default c1-4)")
    p.add_argument("--frames", type=int, default=9, help="latent frames (default 9)")
    p.add_argument("--mask", choices=MASKS, default="teacher_forcing")
    p.add_argument("--window", type=int, help="chunks that stay visible, the current one included (default: all)")
    p.add_argument("--sink", type=int, default=0, help="first chunks that always stay visible (default 0)")
    p.add_argument("--frame_tokens", type=int, default=1, help="tokens a latent frame (default 1)")
    p.add_argument("--save", type=Path, default=Path("output/mask.png"), help="where the PNG goes")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """The command: draws a mask and prints where it is."""
    from rcm_jax.cli import one_line_errors

    args = parser().parse_args(argv)
    with one_line_errors():
        spans = ChunkPattern.parse(args.pattern).spans(args.frames)
        function = {"block_causal": block_causal, "teacher_forcing": teacher_forcing}[args.mask]
        mask = function(spans, args.frame_tokens, window=args.window, sink=args.sink)
        title = f"{args.mask}, {args.pattern}, {args.frames} latent frames"
        print(draw(mask, spans, args.frame_tokens, args.save, title))


if __name__ == "__main__":
    main()
