"""What a call asks for, worked out: a row a video, sizes, the image; nothing computed yet."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.media.images import open_image
from rcm_jax.media.input_video import InputVideo, Source
from rcm_jax.options import refuse
from rcm_jax.pipelines.incoming import frames_of_input, open_input
from rcm_jax.pipelines.kinds import BIDIRECTIONAL, CAUSAL, WAN
from rcm_jax.pipelines.opening import Opened
from rcm_jax.pipelines.options import SamplingOptions
from rcm_jax.pipelines.prompt_times import (
    Texts,
    TimedPrompts,
    check_cuts,
    read_timed_prompts,
    scene_texts,
    timed_texts,
)
from rcm_jax.sampling.prompts import PromptSchedule
from rcm_jax.worlds.world import Size, World

Prompts = str | Sequence[str] | None
Features = tuple[Float[np.ndarray, "V L D"], Float[np.ndarray, "v L D"] | None]  # of texts, and under guidance of none
SMALL_BATCH = 48  # videos at a time of a small network


@dataclasses.dataclass(frozen=True)
class Request:
    """prompts, indices: one a video; the noise of a video comes from (seed, index) alone. negative_prompts: one, or one
    a video. image: to start from, or None. size: width and height in pixels. latent_shape: (T, H, W). batch_size:
    videos at a time of a bidirectional network. texts: what a video follows, one after the other as `changes` says;
    the prompt alone where it does not change. timed: the prompts with their times, where they were given so. video:
    what comes in, or None; endless: until it ends. noise_pattern: of chunks whose noises are drawn one by one."""

    prompts: list[str]
    indices: list[int]
    seed: int
    negative_prompts: list[str]
    image: Image.Image | None
    size: Size
    num_frames: int
    latent_shape: tuple[int, int, int]
    batch_size: int
    texts: list[tuple[str, ...]]
    changes: PromptSchedule
    timed: TimedPrompts | None
    video: InputVideo | None = None
    endless: bool = False
    noise_pattern: ChunkPattern | None = None

    def features(self, world: World, *, guided: bool) -> Features:
        """Of every video's first text, then of every video's second one, …; and under guidance of the negative prompts
        (one row that serves all, or one a video). All are encoded together: a large encoder is read once."""
        words = [text for at_once in zip(*self.texts, strict=True) for text in at_once]
        features = world.encode_text([*words, *(self.negative_prompts if guided else [])])
        return features[: len(words)], features[len(words) :] if guided else None


def batch_rows(videos: int, size: int) -> list[Int[np.ndarray, " size"]]:
    """Which videos are in each batch. The last batch is filled up with the last video: one size, one program."""
    return [np.minimum(np.arange(start, start + size), videos - 1) for start in range(0, videos, size)]


def read_request(opened: Opened, prompt: Prompts, asked: SamplingOptions, video: Source | None = None) -> Request:
    """Raises ArgumentError for options that do not apply to the network, and for what is not possible. video: in place
    of `video_path`."""
    info, world = opened.info, opened.world
    name = opened.options.dit_path
    if opened.files is None:
        refuse(asked, WAN, f"{name} is of the built-in world")
    if info.causal:
        refuse(asked, BIDIRECTIONAL, f"{name} is causal ({info.causal['pattern']})")
    else:
        refuse(asked, CAUSAL, f"{name} is not causal")
    prompts, timed = _prompts(prompt, asked, world)
    image = None if asked.image_path is None else open_image(asked.image_path)
    _check_image(opened, asked, image)
    size = world.size(asked.resolution, asked.aspect_ratio, asked.size, image if asked.adaptive_resolution else None)
    texts, fsdp = _texts(opened, asked, prompts, timed, size), opened.options.fsdp
    num_frames, endless = texts.num_frames or _num_frames(opened, asked), False
    coming = open_input(world, asked, video, size)
    if coming is not None:
        num_frames, endless = frames_of_input(world, info, asked, coming, num_frames)
    latent_shape = world.latent_shape(size, num_frames, info.model)
    videos = [words for words in prompts for _ in range(asked.num_samples)]
    whole = -(-min(SMALL_BATCH, len(videos)) // fsdp) * fsdp
    return Request(
        videos, _indices(asked, len(videos)), asked.seed, _negative_prompts(asked, prompts), image, size, num_frames,
        latent_shape, asked.batch_size or (whole if world.small else fsdp),
        [words for words in texts.prompts for _ in range(asked.num_samples)], texts.schedule, timed,
        coming, endless, _noise_pattern(asked, latent_shape[0]),
    )  # fmt: skip


def _prompts(prompt: Prompts, asked: SamplingOptions, world: World) -> tuple[list[str], TimedPrompts | None]:
    if asked.prompts_file is not None:
        if prompt is not None:
            raise ArgumentError("{prompt} and {prompts_file} both say what to show: give one", prompt=None,
                                prompts_file=None)  # fmt: skip
        timed = read_timed_prompts(asked.prompts_file)
        return [timed[0][1]], timed
    prompts = [world.prompt] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ArgumentError("{prompt} is an empty list: give one at least", prompt=None)
    return prompts, None


def _texts(opened: Opened, asked: SamplingOptions, prompts: list[str], timed: TimedPrompts | None, size: Size) -> Texts:
    """What the videos of each prompt follow. Of a bidirectional network a prompt is one text, whatever is in it."""
    info, world = opened.info, opened.world
    if not info.causal:
        return Texts([(words,) for words in prompts], PromptSchedule())
    pattern = ChunkPattern.parse(info.causal["pattern"])
    if timed is not None:
        latent_frames, *_ = world.latent_shape(size, _num_frames(opened, asked), info.model)
        return timed_texts(timed, world, pattern, latent_frames, asked.prompt_blend)
    texts = scene_texts(prompts, world, pattern, asked.prompt_blend)
    if texts.num_frames is not None and asked.num_frames is not None:
        raise ArgumentError(
            "{num_frames} and the lengths of the scenes in {prompt} both say how long the video is: give one",
            num_frames=asked.num_frames, prompt=None,
        )  # fmt: skip
    check_cuts(texts.schedule, taken=asked.cache_policy == "infinity_rope")
    return texts


def _check_image(opened: Opened, asked: SamplingOptions, image: Image.Image | None) -> None:
    if asked.adaptive_resolution and image is None:
        raise ArgumentError(
            "{adaptive_resolution} takes its proportions from an image: give {image_path}", adaptive_resolution=None,
            image_path=None,
        )  # fmt: skip
    model = opened.info.model
    if not opened.info.causal and model.takes_image != (image is not None) and not model.image_first:
        says = (
            "it makes videos from an image: give {image_path}"
            if model.takes_image
            else "it takes no image: {image_path}"
        )
        raise ArgumentError(
            f"{opened.options.dit_path} has {model.in_channels} input channels; {says}", image_path=None
        )


def _num_frames(opened: Opened, asked: SamplingOptions) -> int:
    info, world = opened.info, opened.world
    own = world.usual_frames
    if info.causal or own is None:
        own = world.num_frames(info.latent_shape[0])
    if asked.num_frames in (None, own):
        return own
    if world.small and not info.causal:
        raise ArgumentError(
            f"{{num_frames}} does not apply: {opened.options.dit_path} is of the built-in world: {own} frames",
            num_frames=asked.num_frames,
        )
    return asked.num_frames


def _indices(asked: SamplingOptions, videos: int) -> list[int]:
    if asked.indices is None:
        return list(range(asked.num_samples)) * (videos // asked.num_samples)
    if len(asked.indices) != videos:
        raise ArgumentError(f"{{indices}} has {len(asked.indices)} entries for {videos} videos", indices=None)
    return list(asked.indices)


def _noise_pattern(asked: SamplingOptions, latent_frames: int) -> ChunkPattern | None:
    if asked.noise_pattern is None:
        return None
    try:
        pattern = ChunkPattern.parse(asked.noise_pattern)
        pattern.spans(latent_frames)
    except ValueError as error:
        raise ArgumentError(f"{{noise_pattern}}: {error}", noise_pattern=None) from error
    return pattern


def _negative_prompts(asked: SamplingOptions, prompts: Sequence[str]) -> list[str]:
    negative = asked.negative_prompt or ""
    if isinstance(negative, str):
        return [negative]
    if len(negative) != len(prompts):
        raise ArgumentError(
            f"{{negative_prompt}} has {len(negative)} entries for {len(prompts)} prompts", negative_prompt=None
        )
    return [words for words in negative for _ in range(asked.num_samples)]
