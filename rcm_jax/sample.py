"""Samples videos: prompts in, an MP4, GIF or PNG out.

  python -m rcm_jax.sample --dit_path student.safetensors --prompt "a red circle moving left"      # the built-in world
  python -m rcm_jax.sample --dit_path rCM_Wan2.1_T2V_1.3B_480p.pt --prompt "a fox in the snow"      # Wan2.1
  python -m rcm_jax.sample --dit_path Wan2.1-I2V-14B-480P --image_path fox.png --adaptive_resolution --prompt "it runs"

A distilled student makes a video in --num_steps 1, 2, 3 or 4; a teacher is integrated as an ODE with guidance
(--sampler, --guidance_scale, 50 steps). Which of them a network is, our files say; of other files those named as rCM's
and Self-Forcing's students are are students, all else is a teacher; --kind overrules both. Sample i of a prompt and a
seed is the same on every run and in every batch. Causal networks: python -m rcm_jax.sample_causal.

Without --dit_path the built-in toy teacher is sampled. Prompts of the toy world are made of the words: a, red green
blue yellow, circle square diamond, moving, left right up down. Every other network is one of Wan's, and takes our files
(python -m rcm_jax.convert) or the published ones: the files around it are looked for beside it and in checkpoints/.
Text encoder, network and autoencoder are in memory one after the other. From Python: rcm_jax.load.

Files say in their comment how they were made: --again VIDEO makes it anew, on the same machine
the same to the bit (a call from Python that watched its steps, and a causal one that did not stream: to rounding).
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

from rcm_jax.cli import command_parser, one_line_errors

SAVE_PATH = Path("output/generated_video.mp4")


def parser() -> argparse.ArgumentParser:
    from rcm_jax.options import add_options
    from rcm_jax.pipelines.kinds import CAUSAL
    from rcm_jax.pipelines.options import FileOptions, OutputOptions, SamplingOptions

    p = command_parser("sample", __doc__)
    add_options(p, OutputOptions)
    p.add_argument("--prompts_file", type=Path, default=argparse.SUPPRESS,
                   help="a prompt a line; videos are numbered: generated_video_000.mp4, …")  # fmt: skip
    add_options(p.add_argument_group("how to sample"), SamplingOptions, without=[CAUSAL])
    add_options(p.add_argument_group("files and devices"), FileOptions, without=[CAUSAL])
    return p


def run(args: argparse.Namespace) -> list[Path | str]:
    """Writes the videos; returns where they are. A dry run: what it says."""
    from rcm_jax.errors import ArgumentError
    from rcm_jax.media.sizes import columns
    from rcm_jax.media.video import check_fps, video_path
    from rcm_jax.options import taken
    from rcm_jax.pipelines.about import fill_in
    from rcm_jax.pipelines.options import FileOptions, OutputOptions, SamplingOptions, told_of_yes
    from rcm_jax.pipelines.pipeline import load
    from rcm_jax.pipelines.video import side_by_side
    from rcm_jax.worlds.prompts_file import given_prompts

    given = vars(args)
    if "again" in given:
        fill_in(given, given["again"], "sample")
    prompts_file = given.pop("prompts_file", None)  # of this command: a video a line
    options, output = taken(given, SamplingOptions), OutputOptions(**taken(given, OutputOptions))
    SamplingOptions(**options)  # its errors, before a file is opened
    save_path = video_path(output.path(SAVE_PATH), "save_path")
    check_fps(output.fps, save_path.suffix)
    prompts = given_prompts(output.prompt, prompts_file)
    files = taken(given, FileOptions)
    if output.dry_run:
        from rcm_jax.pipelines.dry_run import page

        return [page(files, output.gpu, prompts, options)]
    pipe = load(**files)
    if pipe.causal:
        raise ValueError(f"the network is causal ({pipe.info.causal['pattern']}): use python -m rcm_jax.sample_causal")
    if output.scale not in (None, 1) and pipe.world.scale == 1:
        raise ArgumentError("{scale} does not apply: the network is not of the built-in world", scale=None)
    request, scale = pipe.request(prompts, **options), output.scale or pipe.world.scale
    in_a_file = options.get("num_samples", 1) if prompts_file else len(request.prompts)
    columns(in_a_file, tuple(side * scale for side in request.size), pipe.world.gap * scale)  # its errors
    print(f"sampled as a {pipe.info.kind}: {pipe.sampling(**options)}", file=sys.stderr)
    with told_of_yes():
        videos = pipe.videos(prompts, time_limit=output.time_limit, **options)
    paths = []
    for i in itertools.count():
        changes = {"scale": scale, "fps": output.fps or pipe.world.fps}
        samples = [dataclasses.replace(video, **changes) for video in itertools.islice(videos, in_a_file)]
        if not samples:
            return paths
        path = save_path.with_stem(f"{save_path.stem}_{i:03d}") if prompts_file else save_path
        paths.append(side_by_side(samples, gap=pipe.world.gap).save(path))


def main(argv: list[str] | None = None) -> None:
    """The command; installed as rcm-sample."""
    args = parser().parse_args(argv)
    with one_line_errors():
        print(*run(args), sep="\n")


if __name__ == "__main__":
    main()
