"""What becomes of a causal video past the length that its network was trained for, under each policy of the cache.

    python -m tests.benchmarks.policies_over_time --videos 48 --seeds 0 1 2 [--json OUT]

Videos of the built-in world, --times as long as trained (20). In each chunk that ends at 1, 2, 5, 10 and 20 times that
length: the share of videos that show what the caption says, the overlap of the shape with its ideal, and the noise of
the background. Every policy keeps as much as was trained: with the chunk that is made, no more than nine latent frames.
The past as a whole (`none`) stands beside them.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import rcm_jax
from rcm_jax.chunks import ChunkPattern
from rcm_jax.worlds import toy
from rcm_jax.worlds.toy.scores import measure
from tests import benchmarks
from tests.benchmarks.prompt_change import captions, moves

POLICIES = {
    "none": {},
    "sliding_window": dict(window_blocks=4),
    "sliding_window, sink 1": dict(window_blocks=4, sw_sink_blocks=1),
    "rolling_sink": dict(total_blocks=4, sink_blocks=3, recent_blocks=1),
    "infinity_rope": dict(cache_blocks=4, f_limit=9),
    "infinity_rope, no sink": dict(cache_blocks=4, ir_sink_blocks=0, f_limit=9),
    "deep_forcing": dict(df_sink_frames=3, df_budget_frames=7, df_recent_frames=2),
    "memrope": dict(mr_sink_frames=1, mr_local_frames=4),
    "relax_forcing": dict(rx_sink_frames=3, rx_budget_frames=7, rx_recent_frames=2),
}
AT = (1, 2, 5, 10, 20)  # times the trained length
SEEN = ("colour", "shape", "direction", "all", "overlap", "noise")


def scored(videos: np.ndarray, wanted: list[str], spans: list[tuple[int, int]]) -> dict[str, list[float]]:
    """Means over the videos [V, F, H, W, 3] for each chunk."""
    out = {name: [] for name in SEEN}
    for start, end in spans:
        still = videos[:, np.linspace(start, end - 1, toy.FRAMES).round().astype(int)]  # as long as scores want it
        record = measure(still, wanted)
        record["direction"] = record["found"] & moves(videos[:, [start - 1, end - 1]], wanted, end - start)
        record["all"] = record["colour"] & record["shape"] & record["direction"]
        for name in SEEN:
            out[name].append(float(np.mean(record[name])))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit_path", nargs="+", default=["toy_causal"], help="networks; means are over all of them")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES), metavar="POLICY")
    parser.add_argument("--videos", type=int, default=48, help="of each seed and network")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--times", type=int, default=20, help="how much longer than trained")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    args = parser.parse_args()
    wanted = [old for old, _ in captions(args.videos, "all")]
    rows: dict[str, list[dict]] = {name: [] for name in args.policies}
    for path in args.dit_path:
        pipe = rcm_jax.load(path)
        pattern = ChunkPattern.parse(pipe.info.causal["pattern"])
        trained = pipe.info.latent_shape[0]
        frames = pattern.start(-(-args.times * trained // pattern.rest) + 1)
        spans = pattern.spans(frames)
        ends = [next(s for s in spans if s[1] >= n * trained) for n in AT if n <= args.times]
        for seed in args.seeds:
            for name in args.policies:
                how = {"cache_policy": name.split(",")[0], "seed": seed, "indices": range(len(wanted))}
                videos = pipe.arrays(
                    wanted, num_frames=frames, progress=f"{name}, seed {seed}", **how, **POLICIES[name]
                )  # fmt: skip
                rows[name].append(scored(videos, wanted, ends))
    print(table(rows, [n for n in AT if n <= args.times]))
    told = {
        "machine": benchmarks.machine("jax", "jaxlib"),
        "arguments": json.loads(json.dumps(vars(args), default=str)),
    }
    benchmarks.write_json(args.json, told | {"rows": rows})


def table(rows: dict[str, list[dict]], at: list[int]) -> str:
    """Means over networks and seeds; in brackets the least and the greatest of them."""
    lines = [f"| | policy | {' | '.join(f'{n} x' for n in at)} |", "|---" * (2 + len(at)) + "|"]
    for what in SEEN:
        for name, runs in rows.items():
            values = np.array([run[what] for run in runs])
            cells = [f"{v.mean():.2f} [{v.min():.2f}, {v.max():.2f}]" for v in values.T]
            lines.append(f"| {what} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
