"""Whether videos of the built-in world obey a prompt that comes while they are made.

    python -m tests.benchmarks.prompt_change --videos 48 --seeds 0 1 2 [--json OUT]

Every video begins with one caption and goes on with another, from chunk --change on. Of each chunk k after that: the
share of videos that show what the new caption says, each way of changing the prompt. Beside them stand the two that
bound it: `never`, videos that keep the old prompt, and `from the start`, videos that had the new one all along, which
also fade past the length that the network was trained for.

Colour and shape are measured on the chunk's own frames, the direction from the last frame before the chunk to its last.
--what says which of the three differ between the captions; a direction changes to its opposite, so that the shape stays
in the picture. A way is what it gives to `load(…)(prompt, …)`: a new option of sampling is one more entry of WAYS.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

import rcm_jax
from rcm_jax.chunks import ChunkPattern, Spans
from rcm_jax.worlds import toy
from rcm_jax.worlds.toy.scores import MIN_SPEED, measure, segment
from tests import benchmarks

SEEN = ("colour", "shape", "direction", "all")
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


@dataclasses.dataclass(frozen=True)
class Way:
    """options: of sampling. old, new: whether its videos begin with the old caption, and end with the new one. cut:
    whether the new one begins with a cut."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    old: bool = True
    new: bool = True
    cut: bool = False


INFINITY = {"cache_policy": "infinity_rope", "cache_blocks": 4, "f_limit": 9}
WAYS = {
    "never": Way(new=False),
    "from the start": Way(old=False),
    "at once": Way(),
    "blended over 2": Way({"prompt_blend": 2}),
    "blended over 4": Way({"prompt_blend": 4}),
    "recache": Way({"prompt_recache": "all"}),
    "recache, sink kept": Way({"prompt_recache": "keep_sink"}),
    "infinity_rope": Way(INFINITY),
    "infinity_rope, cut": Way(INFINITY, cut=True),
}


def captions(count: int, what: str) -> list[tuple[str, str]]:
    """Old and new: of all captions in turn, in an order in which a part of them is balanced."""

    def other(caption: toy.Caption) -> toy.Caption:
        colours, shapes = list(toy.COLOURS), list(toy.SHAPES)
        changed = {
            "colour": colours[(colours.index(caption.colour) + 1) % len(colours)],
            "shape": shapes[(shapes.index(caption.shape) + 1) % len(shapes)],
            "direction": OPPOSITE[caption.direction],
        }
        return dataclasses.replace(caption, **(changed if what == "all" else {what: changed[what]}))

    every = toy.captions()
    olds = [toy.Caption.parse(every[(i * 7) % len(every)]) for i in range(count)]  # 7 has no divisor in common with 48
    return [(str(old), str(other(old))) for old in olds]


def prompt(way: Way, old: str, new: str, seconds: tuple[float, float]) -> str:
    """Two scenes, whatever they show: so all ways have the same frames."""
    texts = (old if way.old else new, new if way.new else old)
    (old, new), end = (f"{text} [{length}s" for text, length in zip(texts, seconds, strict=True)), "#" * way.cut
    return f"{old}] | {new}{end}]"


def obeyed(videos: np.ndarray, wanted: list[str], spans: Spans) -> dict[str, np.ndarray]:
    """For each chunk of `spans`, what its videos [V, F, H, W, 3] show of the captions: booleans [V, chunks]."""
    out: dict[str, list[np.ndarray]] = {name: [] for name in SEEN}
    for start, end in spans:
        still = videos[:, np.linspace(start, end - 1, toy.FRAMES).round().astype(int)]  # as long as scores want it
        record = measure(still, wanted)
        right = {"colour": record["colour"], "shape": record["shape"]}
        right["direction"] = record["found"] & moves(videos[:, [start - 1, end - 1]], wanted, end - start)
        for name in SEEN[:3]:
            out[name].append(right[name])
        out["all"].append(right["colour"] & right["shape"] & right["direction"])
    return {name: np.stack(values, axis=1) for name, values in out.items()}


def moves(pair: np.ndarray, wanted: list[str], frames: int) -> np.ndarray:
    """Whether the shape of two frames, so many apart, went as each caption says, and more so than across."""
    cover = segment(np.clip(pair, -1, 1).astype(np.float32))[1]
    grid, area = np.arange(toy.SIZE), np.maximum(cover.sum((-2, -1)), 1e-3)
    centre = np.stack([(cover.sum(-2) @ grid), (cover.sum(-1) @ grid)], axis=-1) / area[..., None]
    speed = (centre[:, 1] - centre[:, 0]) / frames
    ways = np.array([toy.DIRECTIONS[toy.Caption.parse(words).direction] for words in wanted])
    along = (speed * ways).sum(-1)
    return (along > MIN_SPEED) & (along > 2 * np.abs((speed * ways[:, ::-1]).sum(-1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit_path", nargs="+", default=["toy_causal"], help="networks; shares are of all of them")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--what", default="all", choices=SEEN, help="what the new caption changes")
    parser.add_argument("--videos", type=int, default=48, help="of each seed and network")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--change", type=int, default=3, help="chunk from which the new prompt holds")
    parser.add_argument("--chunks", type=int, default=5, help="chunks that follow the new prompt")
    parser.add_argument("--window", type=int, default=5, help="chunks that stay visible")
    parser.add_argument("--sink", type=int, default=1, help="first chunks that stay visible for good")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    args = parser.parse_args()
    pairs = captions(args.videos, args.what)
    shares: dict[str, dict[str, list]] = {name: {seen: [] for seen in SEEN} for name in args.ways}
    for path in args.dit_path:
        pipe = rcm_jax.load(path)
        pattern, fps = ChunkPattern.parse(pipe.info.causal["pattern"]), pipe.world.fps
        at = pattern.start(args.change)
        end = pattern.start(args.change + args.chunks)
        spans = pattern.spans(end)[args.change :]
        for seed in args.seeds:
            for name in args.ways:
                prompts = [prompt(WAYS[name], *pair, (at / fps, (end - at) / fps)) for pair in pairs]
                options = WAYS[name].options
                if "cache_policy" not in options:
                    options = options | {"window": args.window, "sink": args.sink}
                asked = {"seed": seed, "indices": range(len(pairs)), "progress": f"{name}, seed {seed}"}
                videos = pipe.arrays(prompts, **asked, **options)
                assert videos.shape[1] == end
                for seen, right in obeyed(videos, [new for _, new in pairs], spans).items():
                    shares[name][seen].append(right.mean(0).tolist())  # a row a network and seed
    print(table(shares, args.chunks))
    told = {
        "machine": benchmarks.machine("jax", "jaxlib"),
        "arguments": json.loads(json.dumps(vars(args), default=str)),
    }
    benchmarks.write_json(args.json, told | {"shares": shares})


def table(shares: dict[str, dict[str, list]], chunks: int) -> str:
    """Means over networks and seeds; in brackets the least and the greatest of them, where they differ."""
    lines = [f"| obeyed | new prompt | {' | '.join(f'k = {k}' for k in range(chunks))} |", "|---" * (2 + chunks) + "|"]
    for what in SEEN:
        for name, seen in shares.items():
            cells = [
                f"{c.mean():.2f}" + (f" [{c.min():.2f}, {c.max():.2f}]" if c.min() < c.max() else "")
                for c in np.array(seen[what]).T
            ]
            lines.append(f"| {what} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
