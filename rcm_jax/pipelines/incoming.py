"""Input video of a causal network: how much of it is asked for, and where each chunk begins."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt8

from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.media.input_video import InputVideo, Source, open_video
from rcm_jax.model_file import ModelInfo
from rcm_jax.pipelines.options import SamplingOptions
from rcm_jax.sampling.noise_control import InputNoise, begin_chunk
from rcm_jax.sampling.schedules import Times
from rcm_jax.sampling.stream import Begin, Begins
from rcm_jax.types import Latents, Video
from rcm_jax.worlds.world import Encode, Size, World


@dataclasses.dataclass(frozen=True)
class Incoming:
    """sizes: frames of the first chunk and of the others."""

    video: InputVideo
    noise: InputNoise
    sizes: tuple[int, int]
    encode: Encode

    def begins(self, mesh: Mesh) -> Begins:
        """Of one run over the video; one video begins all of a batch. `mesh`: the network's, which is set."""
        chunks, here = self.video.chunks(*self.sizes), NamedSharding(mesh, P())
        state, before = None, None

        def begin(_: int, noise: Latents, times: Times) -> Begin | None:
            nonlocal state, before
            frames = next(chunks, None)
            if frames is None:
                return None
            video = _pixels(frames[None])
            latents, state = self.encode(video, state)
            out, before = begin_chunk(self.noise, times, video, jax.device_put(latents, here), noise, before)
            return out

        return begin


@jax.jit
def _pixels(frames: UInt8[Array, "B F H W 3"]) -> Video:
    return frames.astype(jnp.float32) / 127.5 - 1


def chunk_sizes(world: World, info: ModelInfo) -> tuple[int, int]:
    """Frames of the first chunk and of the others."""
    pattern = ChunkPattern.parse(info.causal["pattern"])
    first = world.num_frames(pattern.first)
    return first, world.num_frames(pattern.first + pattern.rest) - first


def open_input(world: World, asked: SamplingOptions, video: Source | None, size: Size) -> InputVideo | None:
    """What is given, or the file that is named; None for neither. Raises ArgumentError for what cannot be read, and for
    options of input that are given without."""
    source = asked.video_path if video is None else video
    if source is None:
        for name in ("noise_scale", "noise_rule", "stream_batch"):
            if getattr(asked, name) not in (None, False):
                raise ArgumentError(
                    f"{{{name}}} is for input video: give {{video_path}}", **{name: None, "video_path": None}
                )
        return None
    if asked.image_path is not None:
        raise ArgumentError(
            "give {video_path} or {image_path}, not both", video_path=asked.video_path, image_path=asked.image_path
        )
    return open_video(source, fps=world.fps, size=size)


def frames_of_input(
    world: World, info: ModelInfo, asked: SamplingOptions, video: InputVideo, own: int
) -> tuple[int, bool]:
    """How many frames are made, and whether it goes on until the input ends, whose length nobody knows: a camera's.

    As many as are asked for. Else, with a window, all whole chunks of the input, and without one no more than the
    network's `own` number. Raises ArgumentError for an input that is shorter than that, or than a chunk."""
    first, rest = chunk_sizes(world, info)
    if video.length is not None and video.length < first:
        raise video.too_short(video.length, first)
    if asked.num_frames is not None:
        if video.length is not None and video.length < asked.num_frames:
            words = f"has {video.length} frames at {video.fps:g} a second, fewer than {{num_frames}}"
            raise video.error(words, num_frames=asked.num_frames)
        return asked.num_frames, False
    window = info.causal.get("window") if asked.window is None else asked.window
    window = window if asked.cache_policy is None else asked.cache_policy != "none"
    window = window or asked.stream_batch  # which keeps a few frames of any number
    if video.length is None:
        return own, bool(window) and video.path is None
    whole = first + (video.length - first) // rest * rest
    return whole if window else min(whole, own), False
