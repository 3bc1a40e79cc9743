"""Draws a mask: python -m rcm_jax.chunks --pattern c1-4 --frames 9 --mask teacher_forcing --save mask.png

A row is a query, a column a key, a square a pair of tokens; lines part the chunks. See docs/causal.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rcm_jax.chunks import ChunkPattern, Spans, block_causal, teacher_forcing
from rcm_jax.cli import command_parser
from rcm_jax.kernels.masks import KeyRuns, dense

MASKS = {"block_causal": block_causal, "teacher_forcing": teacher_forcing}


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
    p = command_parser("chunks", __doc__)
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
    from rcm_jax.outputs import PICTURES, check_output

    args = parser().parse_args(argv)
    with one_line_errors():
        check_output(args.save, "save", PICTURES)
        spans = ChunkPattern.parse(args.pattern).spans(args.frames)
        mask = MASKS[args.mask](spans, args.frame_tokens, window=args.window, sink=args.sink)
        title = f"{args.mask}, {args.pattern}, {args.frames} latent frames"
        print(draw(mask, spans, args.frame_tokens, args.save, title))


if __name__ == "__main__":
    main()
