"""Videos of a list of prompts in VBench's layout: `PROMPT-0.mp4` to `PROMPT-4.mp4`, on any number of processes.

As published, sample i of every prompt is made from the noise of seed + i: all prompts share five noises.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rcm_jax.errors import ArgumentError
from rcm_jax.media.pictures import enlarge
from rcm_jax.media.video import WrittenBehind
from rcm_jax.options import ShareOptions, option
from rcm_jax.outputs import check_folder, unfinished
from rcm_jax.pipelines.about import tags
from rcm_jax.pipelines.options import OF_ONE_VIDEO, SamplingOptions
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.pipelines.request import Request
from rcm_jax.progress import Progress
from rcm_jax.ranges import at_least
from rcm_jax.vbench.prompts import (
    Entry,
    check_case,
    check_names,
    file_stem,
    measured_list,
    read_prompts,
    video_names,
)
from rcm_jax.vbench.record import Source, keep_record, settings_of

LIST = "vbench_info.json"
REMEMBERED = 48  # texts that a world keeps, and some more
SEEDS = SamplingOptions.__dataclass_fields__["seed"].metadata["range"]
TEXTS = ("augmented", "original")
NOT_HERE = (*OF_ONE_VIDEO, "noise_scale", "noise_rule", "prompt_blend", "prompt_recache")  # a prompt is one text


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions(ShareOptions):
    """Which videos, where, and who makes which of them."""

    prompts: Path = option(
        Path(), "list of prompts and their dimensions: VBench_full_info.json, rCM's list, or one like them",
        required=True,
    )  # fmt: skip
    out: Path = option(Path(), "folder of the videos; the same command makes what is missing in it", required=True)
    samples: int = option(5, "videos of a prompt (5)", range=at_least(1))
    text: str = option(
        "augmented", "of a prompt that has a longer one beside it: augmented, as rCM's tables are made, or original",
        choices=TEXTS,
    )  # fmt: skip
    images: Path | None = option(None, "folder of the images that an image-to-video list names")
    together: int = option(
        48, "videos that are sampled before they are decoded; a large network is read once for them (48)",
        range=at_least(1),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """A video that is to be made: sample `number` of a prompt."""

    entry: Entry
    number: int
    path: Path
    text: str
    image: Path | None


def check_seeds(bench: BenchOptions, asked: SamplingOptions) -> None:
    """Raises ArgumentError where the last sample's seed is none."""
    if asked.seed + bench.samples - 1 not in SEEDS:
        raise ArgumentError(
            f"{{seed}} must be at most {SEEDS.high + 1 - bench.samples} with {{samples}}: sample i is made from the "
            "noise of seed + i", seed=asked.seed, samples=bench.samples,
        )  # fmt: skip


def read_jobs(bench: BenchOptions) -> tuple[list[Entry], list[Job]]:
    """The list, and all videos of this process. Raises ValueError, or OSError for an image that is not there."""
    entries = read_prompts(bench.prompts)
    check_names(entries, bench.samples)
    of_images = [entry for entry in entries if entry.image is not None]
    if of_images and bench.images is None:
        raise ArgumentError(
            f"{len(of_images)} prompts of {{prompts}} begin with an image, like {of_images[0].image!r}: give their "
            "folder as {images}", prompts=bench.prompts, images=None,
        )  # fmt: skip
    if bench.images is not None and not of_images:
        raise ArgumentError("{images} does not apply: no prompt of {prompts} names an image", images=bench.images,
                            prompts=bench.prompts)  # fmt: skip
    missing = [e.image for e in of_images if "\0" in e.image or not (bench.images / e.image).is_file()]
    if missing:
        raise FileNotFoundError(f"{bench.images} has no {missing[0]!r} ({len(missing)} images are missing)")
    return entries, [
        Job(entry, i, bench.out / name, source.text, source.image)
        for i in range(bench.samples)
        for entry in entries[bench.process :: bench.num_processes]
        for name, source in [(video_names(entry, bench.samples)[i], _source(bench, entry))]
    ]


def _source(bench: BenchOptions, entry: Entry) -> Source:
    text = (entry.augmented if bench.text == "augmented" else None) or entry.prompt
    return Source(file_stem(entry), text, None if entry.image is None else bench.images / entry.image)


def sample_all(
    pipe: Pipeline, bench: BenchOptions, entries: Sequence[Entry], jobs: Sequence[Job], options: dict[str, Any]
) -> str:
    """Makes what is missing of `read_jobs`. options: of `Pipeline`'s calls; their seed is the first sample's.
    Returns what there is to say.

    Raises as a call of the pipeline, and ValueError for a folder that does not do; no video is made then.
    """
    folder = check_folder(bench.out, "out")
    check_case(entries, folder)
    names = [name for entry in entries for name in video_names(entry, bench.samples)]
    there = {name for name in names if _whole(folder / name)}  # before the record is looked for, which comes first
    todo = [job for job in jobs if job.path.name not in there]
    sources = [_source(bench, entry) for entry in entries]
    request = _request(pipe, bench, sources[0], options)
    for source in sources[1:] if todo else ():  # every prompt's errors, and every image's, before the first video
        _request(pipe, bench, source, options)
    if pipe.world.small:  # which knows few words
        pipe.world.encode_text([source.text for source in sources])
    augmented = any(source.text != entry.prompt for source, entry in zip(sources, entries, strict=True))
    settings = settings_of(pipe, options, request, sources, augmented=augmented)
    keep_record(folder, settings, begun=bool(there))
    with Progress("sample", len(todo), "video") as progress:
        for group in _groups(todo, min(bench.together, REMEMBERED) if pipe.causal else bench.together):
            for _ in (_streamed if pipe.causal else _sampled)(pipe, group, options):
                progress.update()
    missing = [name for name in names if not _whole(folder / name)]
    if missing:
        return f"{len(todo)} videos made; {len(missing)} of other processes are missing, the first {missing[0]!r}"
    with unfinished(folder / LIST, shared=True) as path:
        path.write_text(json.dumps(measured_list(entries, folder, bench.samples), indent=1))
    return f"{len(todo)} videos made, {len(names)} there; what to run VBench on: {folder / LIST}"


def _whole(path: Path) -> bool:
    """Whether the video is there. An empty file is none: ours appear when they are whole."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder where a video is to be: give another folder")
    return path.exists() and path.stat().st_size > 0


def _request(pipe: Pipeline, bench: BenchOptions, source: Source, options: dict[str, Any]) -> Request:
    """Of one of its videos. Raises as a call does, and names the prompt."""
    told = options if source.image is None else options | {"image_path": source.image}
    try:
        return pipe.check(source.text, **told)
    except ArgumentError as error:
        raise ArgumentError(
            f"{{prompts}}, {source.stem[:60]!r}: {error.message}", **error.arguments | {"prompts": bench.prompts}
        ) from None


def _groups(jobs: Sequence[Job], together: int) -> Iterator[list[Job]]:
    """That are sampled before they are decoded: of one sample number, or of images, each of which is a call."""
    for _, same in itertools.groupby(jobs, key=lambda job: job.number if job.image is None else None):
        while group := list(itertools.islice(same, together)):
            yield group


def _calls(group: Sequence[Job], options: dict[str, Any]) -> Iterator[tuple[list[Job], dict[str, Any]]]:
    """Of one sample number and one image each, with the call's options: a noise for all."""
    for (number, image), same in itertools.groupby(group, key=lambda job: (job.number, job.image)):
        jobs = list(same)
        told = options | {"seed": options.get("seed", 0) + number, "indices": [0] * len(jobs)}
        yield jobs, told if image is None else told | {"image_path": image}


def _sampled(pipe: Pipeline, group: Sequence[Job], options: dict[str, Any]) -> Iterator[None]:
    calls = [([job.text for job in jobs], told) for jobs, told in _calls(group, options)]
    for job, video in zip(group, pipe.several(calls, progress=""), strict=True):
        yield video.save(job.path)


def _streamed(pipe: Pipeline, group: Sequence[Job], options: dict[str, Any]) -> Iterator[None]:
    """One after the other, written while it is made: memory does not grow with the video."""
    scale, calls = pipe.world.scale, list(_calls(group, options))
    if len(calls) > 1:  # so that a large encoder is read once: the world remembers them
        null = [options.get("negative_prompt") or ""] if pipe.sampling(**options).guidance > 1 else []
        pipe.world.encode_text([*(job.text for job in group), *null])
    for jobs, told in calls:
        for job, stream in zip(jobs, pipe.streams([job.text for job in jobs], **told), strict=True):
            says = tags(job.text, stream.about, stream.fps, scale)
            picture = functools.partial(enlarge, scale=scale)
            with (
                unfinished(job.path, shared=True) as path,
                WrittenBehind(path, stream.fps, says, picture=picture) as growing,
            ):
                for part in stream:
                    growing.append(part[0])
            yield
