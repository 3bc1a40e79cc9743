"""Input video in other colours, by the built-in causal student: how much noise lets the colour change, and what of the
motion is left. The table of docs/causal.md.

    python -m tests.benchmarks.video_to_video [--videos 12] [--seeds 3] [--turns 4] [--json OUT]

The world's own videos come in; the prompt is a video's caption with the next colour in its place. A video follows its
prompt where the scores see the new colour; its motion is the input's where the shape stays within NEAR pixels of the
input's shape, in the mean over the frames. Noise 1 is the row of chance: the caption says the direction too, but not
the place. The same is measured under each video's own caption: what noise leaves of the motion where no colour has to
change. Seeds are noises of one call, side by side.
Rows "stream batch" are the steps of neighbouring chunks in one pass on a ring of slots, "in turn" on that ring one by
one; all others are on the ordinary cache. With --turns the input goes to and fro so many times, and its last turn is
what is measured: past the length of training, a few settings alone, the ordinary cache with a window.
"""

import argparse
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

import rcm_jax
from rcm_jax.media.pictures import to_uint8
from rcm_jax.worlds import toy
from rcm_jax.worlds.toy.scores import measure, segment
from tests import benchmarks

NEAR = 2.0  # pixels; shapes are 8 to 11 wide and cross as many
COLOURS = list(toy.COLOURS)
SETTINGS = [
    *({"noise_scale": s, "noise_rule": "fixed"} for s in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
    *({"noise_scale": s, "noise_rule": "motion"} for s in (0.5, 0.6, 0.7, 0.8, 0.9)),
    {"noise_scale": 0.8, "noise_rule": "published", "num_steps": 2},
]
SLOTS = {"stream_batch": True, "num_kv_cache": 7}  # of which 3 stay: two chunks of two frames beside the sink
BATCHED = [
    *({"noise_scale": s, "noise_rule": "fixed"} | SLOTS for s in (0.7, 0.8, 0.9)),
    {"noise_scale": 0.8, "noise_rule": "fixed", "one_by_one": True} | SLOTS,
    {"noise_scale": 0.8, "noise_rule": "published", "num_steps": 2} | SLOTS,
]
LONG = [
    {"noise_scale": s, "noise_rule": "fixed"} | cache
    for cache in ({"window": 4}, SLOTS, SLOTS | {"one_by_one": True})
    for s in (0.7, 0.8)
]


def to_and_fro(inputs: UInt8[np.ndarray, "V F H W 3"], turns: int) -> UInt8[np.ndarray, "V f H W 3"]:
    """A frame at which it turns is there once."""
    ways = inputs, inputs[:, ::-1]
    return np.concatenate([inputs, *(ways[turn % 2][:, 1:] for turn in range(1, turns))], axis=1)


def repainted(caption: str) -> str:
    """The caption with another colour."""
    was = toy.Caption.parse(caption)
    return str(toy.Caption(COLOURS[(COLOURS.index(was.colour) + 1) % len(COLOURS)], was.shape, was.direction))


def centres(videos: Float[np.ndarray, "B F H W 3"]) -> Float[np.ndarray, "B F 2"]:
    """Of the shape in every frame; NaN where there is none."""
    cover = segment(videos.astype(np.float32))[1]
    rows, columns = np.mgrid[: cover.shape[-2], : cover.shape[-1]]
    with np.errstate(invalid="ignore"):
        return np.stack([(cover * at).sum((-2, -1)) / cover.sum((-2, -1)) for at in (columns, rows)], axis=-1)


def unit(frames: UInt8[np.ndarray, "... 3"]) -> Float[np.ndarray, "... 3"]:
    return frames / 127.5 - 1


def compared(
    pipe: rcm_jax.Pipeline, inputs: UInt8[np.ndarray, "V F H W 3"], prompts: list[str], **options
) -> list[dict[str, float]]:
    """Shares of the videos, a row a seed."""
    pairs = zip(prompts, inputs, strict=True)
    made = [np.concatenate(list(pipe.stream(prompt, video=frames, **options)), axis=1) for prompt, frames in pairs]
    rows, true = [], centres(unit(inputs[:, -toy.FRAMES :]))
    for outputs in unit(np.stack(made, axis=1)[:, :, -toy.FRAMES :]):
        right, apart = measure(outputs, prompts), np.linalg.norm(centres(outputs) - true, axis=-1).mean(-1)
        near = apart < NEAR  # False for NaN
        shares = {"colour": right["colour"], "motion": near, "both": right["colour"] & near, "shape": right["shape"]}
        rows.append({name: float(share.mean()) for name, share in shares.items()})
    return rows


def cache_of(options: dict) -> str:
    if "stream_batch" in options:
        return "in turn" if options.get("one_by_one") else "stream batch"
    return f"ordinary, window {options['window']}" if "window" in options else "ordinary"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=12, help="inputs, the same for every seed")
    parser.add_argument("--seeds", type=int, default=3, help="noises of each")
    parser.add_argument("--turns", type=int, default=1, help="of the input to and fro")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    args = parser.parse_args()
    pipe = rcm_jax.load("toy_causal")
    inputs, captions = toy.batch(40_000, range(args.videos))
    inputs, others = to_and_fro(to_uint8(inputs), args.turns), [repainted(caption) for caption in captions]
    print("| cache | rule | noise | times of a chunk | colour | motion | both | shape | own caption: motion |")
    print("|---|---|---|---|---|---|---|---|---|")
    results = []
    for options in (*SETTINGS, *BATCHED) if args.turns == 1 else LONG:
        asked = options | {"num_samples": args.seeds}
        times = pipe.stream(others[0], video=inputs[0], **asked).start.schedule.times[-1]
        new, own = (compared(pipe, inputs, prompts, **asked) for prompts in (others, captions))
        columns = [[row[name] for row in new] for name in new[0]] + [[row["motion"] for row in own]]
        cells = [benchmarks.spread((np.mean(column), min(column), max(column))) for column in columns]
        words = ", ".join(f"{t:.3g}" for t in times[:-1])
        row = [cache_of(options), options["noise_rule"], str(options["noise_scale"]), words, *cells]
        print(f"| {' | '.join(row)} |", flush=True)
        results.append({"options": options, "times": times, "other_colour": new, "own_caption": own})
    told = {"machine": benchmarks.machine("jax", "jaxlib"), "videos": args.videos, "turns": args.turns, "near": NEAR}
    benchmarks.write_json(args.json, told | {"results": results})


if __name__ == "__main__":
    main()
