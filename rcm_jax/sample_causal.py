"""Streams causal video: python -m rcm_jax.sample_causal --model toy --stream --prompt "a red circle moving left"

A causal network makes a video chunk by chunk, each on the keys of those before it. With --stream the MP4 plays while
it grows. What a model file says (chunk pattern, window, steps) is the default; the flags change it. A few-step student,
or any file with --distilled, takes --num_steps 1 to 4 a chunk, or --steps_per_chunk 4 2: four for the first, two for
all others. A teacher is integrated as an ODE with guidance. Times are numbers or fractions: --mid_t 15/16 5/6 5/8, or
one list an entry of --steps_per_chunk: --mid_t_schedules "15/16,5/6,5/8;5/6" (empty for one step: "15/16,5/6,5/8;").
With --window a video may be of any length.

A Wan network is one of our files (python -m rcm_jax.convert) or a published one, and the files around it are found as
python -m rcm_jax.sample finds them. A published file does not say its chunks: give --first_chunk_t and --chunk_t. From
Python: rcm_jax.load(…).stream(…).
"""

import argparse
import contextlib
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rcm_jax.cli import command_parser, number, one_line_errors
from rcm_jax.ranges import at_least

if TYPE_CHECKING:
    from rcm_jax.pipelines.pipeline import Pipeline
    from rcm_jax.sampling.stream import Profile

SAVE_PATH = Path("output/causal_generated_video.mp4")


def parser() -> argparse.ArgumentParser:
    from rcm_jax.options import add_options
    from rcm_jax.pipelines.options import BIDIRECTIONAL, FileOptions, SamplingOptions

    p = command_parser("sample_causal", __doc__)
    p.add_argument("--model", choices=("toy",), help="the built-in causal student, which is also the default")
    p.add_argument("--prompt", help="what to show")
    p.add_argument(
        "--distilled", action="store_true", help="sample in few steps whatever the file says: --kind student"
    )
    p.add_argument("--save_path", type=Path, help=f".mp4, .gif, or .png for a strip of frames (default: {SAVE_PATH})")
    p.add_argument("--fps", type=float, help="frames a second of the file, 0.01 to 120 (default: the world's)")
    p.add_argument("--again", type=Path, metavar="VIDEO", help="make this file's video anew, beside it unless "
                   "--save_path is given; other flags overrule what the file says")  # fmt: skip
    out = p.add_argument_group("streaming and timing")
    out.add_argument("--stream", action="store_true", help="write an MP4 that plays while it grows")
    out.add_argument("--profile", action="store_true", help="print latency, rate and peak memory")
    count, some = number(int, at_least(0)), number(int, at_least(1))
    out.add_argument("--warmup_iters", type=count, default=0, help="runs before the timed ones; implies --profile")
    out.add_argument("--num_runs", type=some, default=1, help="timed runs; more than 1 implies --profile")
    add_options(p.add_argument_group("how to sample"), SamplingOptions, without=[BIDIRECTIONAL])
    add_options(p.add_argument_group("files and devices"), FileOptions, without=[BIDIRECTIONAL])
    return p


def open_pipeline(args: argparse.Namespace) -> "Pipeline":
    from rcm_jax.errors import ArgumentError
    from rcm_jax.options import taken
    from rcm_jax.pipelines.options import FileOptions
    from rcm_jax.pipelines.pipeline import load

    files = taken(vars(args), FileOptions)
    if args.model and "dit_path" in files:
        raise ValueError("give --model or --dit_path, not both")
    if args.distilled and files.setdefault("kind", "student") != "student":
        raise ArgumentError("{distilled} and {kind} say different things", distilled=None, kind=files["kind"])
    return load(**{"dit_path": "toy_causal"} | files)


def report(runs: "list[Profile]", chunks: tuple[int, int], included: str) -> str:
    """Means over the timed runs; chunks: latent frames of the first chunk and of the others."""
    import jax

    def mean(name: str) -> float:
        return float(np.mean([getattr(run, name) for run in runs]))

    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        memory = f"{stats['peak_bytes_in_use'] / 2**30:.2f} GiB on {jax.devices()[0].device_kind}"
    else:  # the host's own devices keep no count
        unit = 1 if sys.platform == "darwin" else 1024
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of this process"
    return "\n".join([
        f"first decoded frame   {mean('first'):.3f} s (a first chunk of {chunks[0]} latent frames)",
        f"a further chunk       {mean('chunk'):.3f} s ({chunks[1]} latent frames)",
        f"steady rate           {mean('rate'):.1f} frames a second of every video",
        f"included              {included}",
        f"peak memory           {memory}",
        f"runs                  {len(runs)}",
    ])  # fmt: skip


def run(args: argparse.Namespace) -> Path:
    from rcm_jax.media.pictures import enlarge, tiled
    from rcm_jax.media.sizes import columns
    from rcm_jax.media.video import SUFFIXES, GrowingVideo, check_fps, video_path
    from rcm_jax.options import taken
    from rcm_jax.pipelines.about import fill_in, tags
    from rcm_jax.pipelines.options import SamplingOptions
    from rcm_jax.pipelines.video import Video
    from rcm_jax.sampling.stream import profile

    if args.again is not None:
        fill_in(vars(args), args.again, "sample_causal")
    save_path = args.save_path or (args.again.with_stem(f"{args.again.stem}_again") if args.again else SAVE_PATH)
    if args.fps is not None:
        check_fps(args.fps, save_path.suffix)
    options = taken(vars(args), SamplingOptions)
    SamplingOptions(**options)  # its errors, before a file is opened
    video_path(save_path, "save_path", (".mp4",) if args.stream else SUFFIXES)
    pipe = open_pipeline(args)
    world, fps = pipe.world, args.fps or pipe.world.fps
    title = ""
    if pipe.causal:
        request = pipe.request(args.prompt, **options)
        title, size = request.prompts[0], tuple(side * world.scale for side in request.size)
        columns(len(request.prompts), size, world.gap * world.scale)  # its errors, before text is read
    stream = pipe.stream(args.prompt, **options)

    def picture(part: np.ndarray) -> np.ndarray:
        return tiled(part, scale=world.scale, gap=world.gap)

    for _ in range(args.warmup_iters):
        profile(stream.__iter__)
    timed = [profile(stream.__iter__)[1] for _ in range(args.num_runs - 1)]
    says = tags(title, stream.about, fps, world.scale)
    with GrowingVideo(save_path, fps, says) if args.stream else contextlib.nullcontext() as growing:
        show = (lambda part: growing.append(enlarge(picture(part), world.scale))) if growing else (lambda part: None)
        parts, last = profile(stream.__iter__, show)
    if not args.stream:
        frames = picture(np.concatenate(parts, axis=1))
        Video(frames, fps, stream.start.seed, title, scale=world.scale, about=stream.about).save(save_path)
    if args.profile or args.warmup_iters or timed:
        steps = ["the prompt's keys", "network", "decoder", "copy to the host"]
        steps += ["writing the MP4 (last run)"] * args.stream + ["compilation (first run)"] * (not args.warmup_iters)
        print(report([*timed, last], stream.chunk_frames, ", ".join(steps) + "; not: text encoder, loading"))
    return save_path


def main(argv: Sequence[str] | None = None) -> None:
    """The command; installed as rcm-sample-causal."""
    args = parser().parse_args(argv)
    with one_line_errors():
        print(run(args))


if __name__ == "__main__":
    main()
