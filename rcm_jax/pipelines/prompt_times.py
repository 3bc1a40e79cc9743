"""What changes in a causal video, and at which chunk: from scenes in a prompt, or from prompts with times."""

import bisect
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.pipelines.scenes import has_scenes, read_scenes
from rcm_jax.sampling.prompts import PromptSchedule
from rcm_jax.worlds.prompts_file import read_prompts_file
from rcm_jax.worlds.world import World

LINE = re.compile(r"(?P<seconds>\d+\.?\d*|\.\d+)\s*:(?!\s*\d+\s*:)(?P<text>.*)")  # not 1:30: ..., whose unit is unclear
SAME_TIME = 1e-6  # seconds

TimedPrompts = list[tuple[float, str]]
Given = str | Path | Sequence[tuple[float, str]]


class Texts(NamedTuple):
    """prompts: for each video its prompts, one after the other. num_frames: where the scenes say it."""

    prompts: list[tuple[str, ...]]
    schedule: PromptSchedule
    num_frames: int | None = None


# --- prompts with times -----------------------------------------------------------------------------------------------


def read_timed_prompts(given: Given) -> TimedPrompts:
    """Seconds and prompt of each line of a file, "12.5: it begins to snow", or of the pairs themselves.

    Raises ArgumentError for a file that cannot be read, a line without a time, a prompt without words, a first time
    that is not 0, and times that do not rise."""
    pairs = _lines(given) if isinstance(given, str | Path) else _pairs(given)
    path = given if isinstance(given, str | Path) else None
    before = None
    for seconds, text in pairs:
        if not text:
            raise ArgumentError(f"{{prompts_file}}: the prompt at {seconds:g} s is empty", prompts_file=path)
        if before is None and seconds != 0:
            raise ArgumentError(
                f"{{prompts_file}}: the first prompt is at {seconds:g} s; a video begins with one, at 0",
                prompts_file=path,
            )  # fmt: skip
        if before is not None and seconds <= before:
            raise ArgumentError(
                f"{{prompts_file}}: {seconds:g} s comes after {before:g} s; times must rise", prompts_file=path
            )
        before = seconds
    return pairs


def _lines(path: str | Path) -> TimedPrompts:
    pairs = []
    for line in read_prompts_file(path, "prompts_file"):
        match = LINE.fullmatch(line)
        if match is None:
            raise ArgumentError(
                f"{{prompts_file}}: {line!r} does not begin with its time in seconds, as in '12.5: it begins to snow'",
                prompts_file=path,
            )  # fmt: skip
        pairs.append((float(match["seconds"]), match["text"].strip()))
    return pairs


def _pairs(given: Sequence[tuple[float, str]]) -> TimedPrompts:
    try:
        pairs = [(float(seconds), text.strip()) for seconds, text in given]
    except (TypeError, ValueError, AttributeError):
        pairs = []
    if not pairs or not all(math.isfinite(seconds) for seconds, _ in pairs):
        raise ArgumentError(
            "{prompts_file} must be a file, or pairs of seconds and prompt, as in [(0, 'a fox'), (2.5, 'it snows')]",
            prompts_file=None,
        )
    return pairs


def first_chunks(timed: TimedPrompts, begins: Sequence[float], end: float) -> tuple[int, ...]:
    """From which chunk each prompt holds: the first that begins at its time or later. begins: seconds at which the
    chunks begin; end: at which the video ends.

    Raises ArgumentError for a prompt that no chunk would follow."""
    starts: list[int] = []
    for seconds, text in timed:
        says = f"{{prompts_file}}: {text!r} is at {seconds:g} s"
        if seconds >= end - SAME_TIME:
            raise ArgumentError(f"{says}; the video ends at {end:g} s", prompts_file=None)
        chunk = bisect.bisect_left(begins, seconds - SAME_TIME)
        if chunk == len(begins):
            raise ArgumentError(
                f"{says}; no chunk begins then or later: the last one does at {begins[-1]:g} s", prompts_file=None
            )
        if starts and chunk == starts[-1]:
            raise ArgumentError(
                f"{says}, and no chunk begins between that and the prompt before it: a chunk follows one prompt",
                prompts_file=None,
            )  # fmt: skip
        starts.append(chunk)
    return tuple(starts)


def timed_texts(timed: TimedPrompts, world: World, pattern: ChunkPattern, latent_frames: int, blend: int) -> Texts:
    """Of one prompt with times for all videos. Raises as `first_chunks`, and ValueError for a pattern that does not fit
    the video."""
    begins = [world.num_frames(start) / world.fps if start else 0.0 for start, _ in pattern.spans(latent_frames)]
    starts = first_chunks(timed, begins, world.num_frames(latent_frames) / world.fps)
    return Texts([tuple(text for _, text in timed)], PromptSchedule(starts, blend=blend))


# --- scenes -----------------------------------------------------------------------------------------------------------


def scene_texts(prompts: Sequence[str], world: World, pattern: ChunkPattern, blend: int) -> Texts:
    """Of prompts that may have scenes; all of a call change together. Raises ArgumentError as `read_scenes`, and where
    scenes differ in length."""
    if not any(map(has_scenes, prompts)):
        return Texts([(words,) for words in prompts], PromptSchedule(blend=blend))
    stride = world.num_frames(2) - world.num_frames(1)
    told = [read_scenes(words, pattern, world.fps, stride) for words in prompts]
    scenes, frames = told[0]
    for words, (others, _) in zip(prompts, told, strict=True):
        if [scene[1:] for scene in others] != [scene[1:] for scene in scenes]:
            raise ArgumentError(
                f"{{prompt}}: the scenes of {words!r} are not as long as those of {prompts[0]!r}: videos of one call "
                "change together", prompt=None,
            )  # fmt: skip
    starts = [sum(scene.blocks for scene in scenes[:i]) for i in range(len(scenes))]
    cuts = tuple(start for start, scene in zip(starts, scenes, strict=True) if scene.cut)
    texts = [tuple(scene.text for scene in others) for others, _ in told]
    return Texts(texts, PromptSchedule(tuple(starts), cuts, blend), frames)


def check_cuts(schedule: PromptSchedule, *, taken: bool) -> None:
    """Raises ArgumentError for cuts where nothing makes them. taken: whether the cache's policy does."""
    if schedule.cuts and not taken:
        raise ArgumentError(
            "{prompt} asks for a cut (#), which {cache_policy} infinity_rope makes: give that, or leave out the #",
            prompt=None, cache_policy=None,
        )  # fmt: skip
