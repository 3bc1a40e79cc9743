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
from rcm_jax.pipelines.options import OF_ONE_VIDEO
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.progress import Progress
from rcm_jax.ranges import at_least
from rcm_jax.vbench.prompts import Entry, check_names, measured_list, read_prompts, video_names

SETTINGS, LIST = "sampling.json", "vbench_info.json"
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


def read_jobs(bench: BenchOptions) -> tuple[list[Entry], list[Job]]:
    """The list, and all videos of this process. Raises ValueError, or OSError for an image that is not there."""
    entries = read_prompts(bench.prompts)
    of_images = [entry for entry in entries if entry.image is not None]
    if of_images and bench.images is None:
        raise ArgumentError(
            f"{len(of_images)} prompts of {{prompts}} begin with an image, like {of_images[0].image!r}: give their "
            "folder as {images}", prompts=bench.prompts, images=None,
        )  # fmt: skip
    if bench.images is not None and not of_images:
        raise ArgumentError("{images} does not apply: no prompt of {prompts} names an image", images=bench.images,
                            prompts=bench.prompts)  # fmt: skip
    missing = [e.image for e in of_images if not (bench.images / e.image).is_file()]
    if missing:
        raise FileNotFoundError(f"{bench.images} has no {missing[0]!r} ({len(missing)} images are missing)")
    return entries, [
        Job(entry, i, bench.out / name, (entry.augmented if bench.text == "augmented" else None) or entry.prompt,
            entry.image and bench.images / entry.image)
        for i in range(bench.samples)
        for entry in entries[bench.process :: bench.num_processes]
        for name in [video_names(entry, bench.samples)[i]]
    ]  # fmt: skip


def sample_all(
    pipe: Pipeline, bench: BenchOptions, entries: Sequence[Entry], jobs: Sequence[Job], options: dict[str, Any]
) -> str:
    """Makes what is missing of `read_jobs`. options: of `Pipeline`'s calls; their seed is the first sample's.
    Returns what there is to say.

    Raises as a call of the pipeline, and ValueError for a folder that does not do; no video is made then.
    """
    folder = check_folder(bench.out, "out")
    todo = [job for job in jobs if not job.path.exists()]
    for job in todo[:1]:  # its errors, before anything is there
        pipe.request(job.text, **_options(pipe, [job], options))
        pipe.sampling(**options)
    folder.mkdir(parents=True, exist_ok=True)
    check_names(entries, folder)
    _same_settings(pipe, bench, options)
    with Progress("sample", len(todo), "video") as progress:
        for group in _groups(todo, bench.together):
            for _ in (_streamed if pipe.causal else _sampled)(pipe, group, options):
                progress.update()
    missing = [name for entry in entries for name in video_names(entry, bench.samples) if not (folder / name).exists()]
    if missing:
        return f"{len(todo)} videos made; {len(missing)} of other processes are missing, the first {missing[0]!r}"
    with unfinished(folder / LIST) as path:
        path.write_text(json.dumps(measured_list(entries, folder, bench.samples), indent=1))
    return f"{len(todo)} videos made, {len(entries) * bench.samples} there; what to run VBench on: {folder / LIST}"


def _groups(jobs: Sequence[Job], together: int) -> Iterator[list[Job]]:
    """Of one sample number and one image each, that one call makes."""
    for _, same in itertools.groupby(jobs, key=lambda job: (job.number, job.image)):
        while group := list(itertools.islice(same, together)):
            yield group


def _options(pipe: Pipeline, group: Sequence[Job], options: dict[str, Any]) -> dict[str, Any]:
    """Of a group's call: a noise for all."""
    told = options | {"seed": options.get("seed", 0) + group[0].number, "indices": [0] * len(group)}
    return told if group[0].image is None else told | {"image_path": group[0].image}


def _sampled(pipe: Pipeline, group: Sequence[Job], options: dict[str, Any]) -> Iterator[None]:
    videos = pipe.videos([job.text for job in group], progress="", **_options(pipe, group, options))
    for job, video in zip(group, videos, strict=True):
        yield video.save(job.path)


def _streamed(pipe: Pipeline, group: Sequence[Job], options: dict[str, Any]) -> Iterator[None]:
    """One after the other, written while it is made: memory does not grow with the video."""
    scale = pipe.world.scale
    streams = pipe.streams([job.text for job in group], **_options(pipe, group, options))
    for job, stream in zip(group, streams, strict=True):
        says = tags(job.text, stream.about, stream.fps, scale)
        picture = functools.partial(enlarge, scale=scale)
        with unfinished(job.path) as path, WrittenBehind(path, stream.fps, says, picture=picture) as growing:
            for part in stream:
                growing.append(part[0])
        yield


def _same_settings(pipe: Pipeline, bench: BenchOptions, options: dict[str, Any]) -> None:
    """Writes how the folder's videos are made. Raises ValueError where there are others, made in another way."""
    told = {"network": str(pipe.opened.options.dit_path), "samples_of": bench.text, "options": options}
    told = json.loads(json.dumps(told, default=str))
    path = bench.out / SETTINGS
    if not path.exists():
        with unfinished(path) as new:
            new.write_text(json.dumps(told, indent=1))
        return
    before = json.loads(path.read_text())
    if before != told:
        name = next(name for name in told if told[name] != before.get(name))
        raise ValueError(
            f"{bench.out} has videos made with {name}={before.get(name)}, not {told[name]}: give another folder"
        )
