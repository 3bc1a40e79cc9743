"""Streams causal video: python -m rcm_jax.sample_causal --model toy --stream --prompt "a red circle moving left"

A causal network makes a video chunk by chunk, each on the keys of those before it. With --stream the MP4 plays while
it grows. What a model file says (chunk pattern, window, steps) is the default; the flags change it. A few-step student,
or any file with --distilled, takes --num_steps 1 to 4 a chunk, or --steps_per_chunk 4 2: four for the first, two for
all others. A teacher is integrated as an ODE with guidance. Times are numbers or fractions: --mid_t 15/16 5/6 5/8, or
one list an entry of --steps_per_chunk: --mid_t_schedules "15/16,5/6,5/8;5/6" (empty for one step: "15/16,5/6,5/8;").
With --window a video may be of any length. Prompts may change on the way: --prompts_file FILE, of lines such as
"12.5: it begins to snow", or scenes with their lengths, --prompt "a red fox [5s] | it sleeps [10s]"; --prompt_blend 4
takes four chunks for each change.
With --video_path chunks begin from those of a video, as noisy as
--noise_scale says, and the prompt repaints it; --stream_batch takes the steps of neighbouring chunks in one pass.

A Wan network is one of our files (python -m rcm_jax.convert) or a published one, and the files around it are found as
python -m rcm_jax.sample finds them. A published file does not say its chunks: give --first_chunk_t and --chunk_t. From
Python: rcm_jax.load(…).stream(…).
"""

import argparse
import contextlib
import functools
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rcm_jax.cli import command_parser, number, one_line_errors
from rcm_jax.ranges import at_least

if TYPE_CHECKING:
    from rcm_jax.sampling.stream import Profile

SAVE_PATH = Path("output/causal_generated_video.mp4")


def parser() -> argparse.ArgumentParser:
    from rcm_jax.options import add_options
    from rcm_jax.pipelines.options import BIDIRECTIONAL, FileOptions, OutputOptions, SamplingOptions

    p = command_parser("sample_causal", __doc__)
    add_options(p, OutputOptions)
    p.add_argument("--model", choices=("toy",), help="the built-in causal student, which is also the default")
    p.add_argument(
        "--distilled", action="store_true", help="sample in few steps whatever the file says: --kind student"
    )
    out = p.add_argument_group("streaming and timing")
    out.add_argument("--stream", action="store_true", help="write an MP4 that plays while it grows")
    out.add_argument("--profile", action="store_true", help="print latency, rate and peak memory")
    count, some = number(int, at_least(0)), number(int, at_least(1))
    out.add_argument("--warmup_iters", type=count, default=0, help="runs before the timed ones; implies --profile")
    out.add_argument("--num_runs", type=some, default=1, help="timed runs; more than 1 implies --profile")
    add_options(p.add_argument_group("how to sample"), SamplingOptions, without=[BIDIRECTIONAL])
    add_options(p.add_argument_group("files and devices"), FileOptions, without=[BIDIRECTIONAL])
    return p


def files_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load`."""
    from rcm_jax.errors import ArgumentError
    from rcm_jax.options import taken
    from rcm_jax.pipelines.options import FileOptions

    files = taken(vars(args), FileOptions)
    if args.model and "dit_path" in files:
        raise ValueError("give --model or --dit_path, not both")
    if args.distilled and files.setdefault("kind", "student") != "student":
        raise ArgumentError("{distilled} and {kind} say different things", distilled=None, kind=files["kind"])
    return {"dit_path": "toy_causal"} | files


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


def run(args: argparse.Namespace) -> Path | str:
    """Writes the video; returns where it is. A dry run: what it says."""
    from rcm_jax.errors import ArgumentError
    from rcm_jax.media.pictures import enlarge, tiled
    from rcm_jax.media.sizes import columns
    from rcm_jax.media.video import SUFFIXES, WrittenBehind, check_fps, video_path
    from rcm_jax.options import taken
    from rcm_jax.pipelines.about import fill_in, tags
    from rcm_jax.pipelines.options import OutputOptions, SamplingOptions, told_of_yes
    from rcm_jax.pipelines.pipeline import load
    from rcm_jax.pipelines.video import Video
    from rcm_jax.progress import Progress
    from rcm_jax.sampling.stream import Profile, profile

    given = vars(args)
    if "again" in given:
        fill_in(given, given["again"], "sample_causal")
    options, output = taken(given, SamplingOptions), OutputOptions(**taken(given, OutputOptions))
    SamplingOptions(**options)  # its errors, before a file is opened
    save_path = video_path(output.path(SAVE_PATH), "save_path", (".mp4",) if args.stream else SUFFIXES)
    check_fps(output.fps, save_path.suffix)
    files = files_of(args)
    if output.dry_run:
        from rcm_jax.pipelines.dry_run import page

        return page(files, output.gpu, output.prompt, options)
    pipe = load(**files)
    world, fps, scale = pipe.world, output.fps or pipe.world.fps, output.scale or pipe.world.scale
    if output.scale not in (None, 1) and world.scale == 1:
        raise ArgumentError("{scale} does not apply: the network is not of the built-in world", scale=None)
    if pipe.causal:
        request = pipe.request(output.prompt, **options)
        columns(len(request.prompts), tuple(side * scale for side in request.size), world.gap * scale)  # its errors
    stream = pipe.stream(output.prompt, **options)
    title = request.prompts[0]

    def picture(part: np.ndarray) -> np.ndarray:
        return tiled(part, scale=scale, gap=world.gap)

    runs = args.warmup_iters + args.num_runs
    with told_of_yes(), Progress("sample", runs * stream.start.chunks, "chunk", limit=output.time_limit) as progress:

        def timed(show: Callable[[np.ndarray], object] | None = None) -> tuple[list, Profile]:
            return profile(stream.__iter__, lambda part: (show and show(part), progress.update()))

        profiles = [timed()[1] for _ in range(runs - 1)][args.warmup_iters :]
        says = tags(title, stream.about, fps, scale)
        written = functools.partial(WrittenBehind, picture=lambda part: enlarge(picture(part), scale))
        with written(save_path, fps, says) if args.stream else contextlib.nullcontext() as growing:
            parts, last = timed(growing and growing.append)
    if not args.stream:
        frames = picture(np.concatenate(parts, axis=1))
        Video(frames, fps, stream.start.seed, title, scale=scale, about=stream.about).save(save_path)
    if args.profile or runs > 1:
        steps = ["the prompt's keys", "network", "decoder", "copy to the host"]
        steps += ["waiting for the MP4's encoder (last run)"] * args.stream
        steps += ["compilation (first run)"] * (not args.warmup_iters)
        print(report([*profiles, last], stream.chunk_frames, ", ".join(steps) + "; not: text encoder, loading"))
    return save_path


def main(argv: Sequence[str] | None = None) -> None:
    """The command; installed as rcm-sample-causal."""
    args = parser().parse_args(argv)
    with one_line_errors():
        print(run(args))


if __name__ == "__main__":
    main()
