"""Makes sets of shards to train from, and says what is in them.

  python -m rcm_jax.data.prepare videos FOLDER --out SET --vae Wan2.1-T2V-1.3B          clips and captions, encoded
  python -m rcm_jax.data.prepare prompts FILE --out TEXTS --text_encoder Wan2.1-T2V-1.3B  features of prompts
  python -m rcm_jax.data.prepare teacher --prompts FILE --teacher Wan2.1-T2V-14B --out SET  latents that it samples
  python -m rcm_jax.data.prepare world --count 4096 --out SET                           the built-in world's videos
  python -m rcm_jax.data.prepare merge SET SET --out SET --samples_per_shard 256        regrouped by their keys
  python -m rcm_jax.data.prepare inspect SET                                            what is in it, what is broken

Stopped at any time, the same command goes on: files that are whole stay. With --process I --num_processes N any number
of processes make one set, each its own files; the last one writes manifest.json. docs/data.md tells more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rcm_jax.cli import Subcommands, number
from rcm_jax.data.prepare.options import ClipOptions, EncoderOptions, SetOptions
from rcm_jax.options import add_options, taken
from rcm_jax.ranges import at_least, between

SAMPLING = ("sampler", "num_steps", "guidance_scale", "shift", "seed", "negative_prompt", "num_frames", "resolution",
            "aspect_ratio", "size", "batch_size")  # fmt: skip


def _set(given: dict[str, Any]) -> SetOptions:
    return SetOptions(**taken(given, SetOptions))


def _videos_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", metavar="FOLDER", type=Path, help="with videos, below it too")
    add_options(p, SetOptions)
    add_options(p.add_argument_group("clips"), ClipOptions)
    add_options(p.add_argument_group("encoders"), EncoderOptions)


def _videos(given: dict[str, Any]) -> str:
    from rcm_jax.data.prepare.videos import make_videos

    clips, encoders = ClipOptions(**taken(given, ClipOptions)), EncoderOptions(**taken(given, EncoderOptions))
    return make_videos(given["folder"], _set(given), clips, encoders)


def _prompts_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompts", metavar="FILE", type=Path, help="a prompt a line")
    add_options(p, SetOptions)
    add_options(p, EncoderOptions, names=["text_encoder_path", "tokenizer_path"])
    p.add_argument("--negative_prompt", help="what guidance leads away from (default: Wan2.1's own)")


def _prompts(given: dict[str, Any]) -> str:
    from rcm_jax.data.prepare.prompts import make_prompts
    from rcm_jax.errors import ArgumentError
    from rcm_jax.worlds.wan.negative import PROMPT

    encoders = EncoderOptions(**taken(given, EncoderOptions))
    if encoders.text_encoder_path is None:
        raise ArgumentError("{text_encoder_path} is missing: name umT5, or a published folder", text_encoder_path=None)
    negative = PROMPT if given["negative_prompt"] is None else given["negative_prompt"]
    return make_prompts(
        given["prompts"], _set(given), encoders.text_encoder_path, encoders.tokenizer_path, negative
    )  # fmt: skip


def _teacher_flags(p: argparse.ArgumentParser) -> None:
    from rcm_jax.pipelines.options import FileOptions, SamplingOptions

    p.add_argument("--prompts", type=Path, required=True, help="a prompt a line; or a folder that `prompts` made")
    p.add_argument("--teacher", "--dit_path", dest="dit_path", required=True,
                   help="file or folder of the network, here or on the hub; 'toy' is the built-in one")  # fmt: skip
    add_options(p, SetOptions)
    how = p.add_argument_group("how to sample (default: as the published set; the built-in world its own way)")
    add_options(how, SamplingOptions, names=SAMPLING)
    add_options(p.add_argument_group("files and devices"), FileOptions, names=_file_names(FileOptions))


def _file_names(options: type) -> list[str]:
    import dataclasses

    without = ("dit_path", "first_chunk_t", "chunk_t", "image_encoder_path", "decoder", "tiny_vae_path")
    return [field.name for field in dataclasses.fields(options) if field.name not in without]


def _teacher(given: dict[str, Any]) -> str:
    from rcm_jax.data.prepare.teacher import make_teacher
    from rcm_jax.pipelines.options import FileOptions, SamplingOptions

    sampling = taken(given, SamplingOptions)
    SamplingOptions(**sampling)  # its errors, before a file is opened
    return make_teacher(given["prompts"], _set(given), taken(given, FileOptions), sampling)


def _world_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--count", type=number(int, at_least(1)), required=True, help="how many videos")
    p.add_argument("--seed", type=number(int, between(0, 2**32 - 1)), default=0, help="of the run whose batches "
                   "they are (default %(default)s)")  # fmt: skip
    add_options(p, SetOptions)


def _world(given: dict[str, Any]) -> str:
    from rcm_jax.data.prepare.builtin import make_world

    return make_world(given["count"], _set(given), given["seed"])


def _merge_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("sources", metavar="SET", nargs="+", help="folders of shards, here or at an fsspec address")
    add_options(p, SetOptions)
    p.add_argument("--renumber", action="store_true", help="new keys, in the order in which the sets are given")
    p.add_argument("--skip_bad", action="store_true", help="leave out what is broken; the manifest names it")


def _merge(given: dict[str, Any]) -> str:
    from rcm_jax.data.prepare.merge import make_merged

    return make_merged(given["sources"], _set(given), renumber=given["renumber"], skip_bad=given["skip_bad"])


def _inspect_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("shards", metavar="SET", help="folder of shards, or one of them, here or at an fsspec address")
    p.add_argument("--index", type=number(int, at_least(0)), help="say what this sample is, counted from 0")
    p.add_argument("--samples", type=number(int, at_least(0)), default=256,
                   help="whose numbers are read, spread evenly; 0: of all (default %(default)s)")  # fmt: skip
    p.add_argument("--decode", action="store_true", help="show the sample's frames in --out")
    p.add_argument("--out", type=Path, help=".mp4, or .png for a strip of frames")
    add_options(p, EncoderOptions, names=["vae_path", "vae_dtype"])


def _inspect(given: dict[str, Any]) -> str:
    from rcm_jax.data.prepare import inspection
    from rcm_jax.errors import ArgumentError
    from rcm_jax.media.video import video_path

    encoders, index, out = EncoderOptions(**taken(given, EncoderOptions)), given["index"], given["out"]
    if given["decode"] != (out is not None):
        raise ArgumentError("{decode} and {out} go together", decode=None, out=out)
    if out is not None:
        video_path(out, "out", (".mp4", ".png"))
    if index is None and out is None:
        lines, broken = inspection.inspect_set(given["shards"], given["samples"])
        if broken:
            print(*lines, *(f"broken: {line}" for line in broken), sep="\n")
            sys.exit(1)
        return "\n".join([*lines, "nothing is broken"])
    sample, place = inspection.find_sample(given["shards"], index or 0)
    lines = inspection.describe_sample(sample, place)
    if out is not None:
        lines.append(str(inspection.decode_sample(sample, encoders.vae_path, encoders.vae_dtype, out)))
    return "\n".join(lines)


COMMANDS: dict[str, tuple[Callable, Callable, str]] = {
    "videos": (_videos_flags, _videos, "shards out of a folder of videos"),
    "prompts": (_prompts_flags, _prompts, "features of prompts, and of the negative prompt"),
    "teacher": (_teacher_flags, _teacher, "latents that a teacher samples for prompts"),
    "world": (_world_flags, _world, "the built-in world's videos"),
    "merge": (_merge_flags, _merge, "shards regrouped"),
    "inspect": (_inspect_flags, _inspect, "what is in a set, and what is broken"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command; installed as rcm-prepare."""
    Subcommands("data.prepare", __doc__, COMMANDS).run(argv)


if __name__ == "__main__":
    main()
