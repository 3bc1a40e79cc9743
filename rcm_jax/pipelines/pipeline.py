"""From a prompt to a video: one pipeline for the built-in world and for Wan, bidirectional and causal networks.

    pipe = load("Wan2.1-T2V-1.3B/rcm.safetensors")
    videos = pipe("a red fox in the snow", num_steps=4, num_samples=2)
    for part in load("toy_causal").stream("a red circle moving left"): ...

The way of a prompt is one line: `load` says what a file is and what surrounds it (`opening.py`); a call reads its
options (`options.py`, `request.py`), settles how the network is sampled (`settings.py`), samples latents
(`bidirectional.py`, `causal.py`) and decodes them in the world (`worlds/`).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from rcm_jax.finite import check_finite
from rcm_jax.hub import Place
from rcm_jax.media.input_video import Source
from rcm_jax.media.pictures import to_uint8
from rcm_jax.model_file import ModelInfo
from rcm_jax.parallel import SEQUENCE_AXIS, make_mesh, shard
from rcm_jax.pipelines.about import describe, join
from rcm_jax.pipelines.bidirectional import both_fit, read_conditions, sample_request
from rcm_jax.pipelines.causal import Start, Stream, causal_network, roll_out_request, start_from
from rcm_jax.pipelines.colours import apply_colours, fit_colours
from rcm_jax.pipelines.networks import Experts, mesh_of
from rcm_jax.pipelines.opening import Opened, Surroundings, open_pipeline, unknown_chunks
from rcm_jax.pipelines.options import FileOptions, SamplingOptions
from rcm_jax.pipelines.request import Features, Prompts, Request, read_request
from rcm_jax.pipelines.settings import sampler_from, schedule_from
from rcm_jax.pipelines.video import Video
from rcm_jax.pipelines.watch import OnStep, Watch
from rcm_jax.progress import waiting
from rcm_jax.sampling.sampler import SamplerConfig
from rcm_jax.sampling.schedules import RolloutSchedule
from rcm_jax.types import Latents, Params
from rcm_jax.worlds.painted import Painted, checked
from rcm_jax.worlds.toy.world import ToyWorld
from rcm_jax.worlds.world import Pixels

Part = Shaped[np.ndarray, "f H W 3"]  # of a video's frames: floats in [-1, 1], or a file's
Make = Callable[[Latents], Iterator[Iterator[Pixels | Painted]]]  # a world's `decode` or `paint`


def load(dit_path: str | Place = "toy", *, devices: Sequence[jax.Device] | None = None, **options: Any) -> "Pipeline":
    """Opens a network, ours or anybody's, and what surrounds it; weights are read when they are needed.

    dit_path: a file or folder, here or on the Hugging Face hub ("org/name", "hf://org/name@revision/file"); "toy" is
    the built-in world's teacher, "toy_causal" its causal student.
    devices: the network's, as many as fsdp times sequence (default: the first ones here).
    options: fields of `FileOptions`, which are the commands' flags.
    Raises FileNotFoundError, ValueError for files that are not what they should be, and ArgumentError (a ValueError)
    that names the argument.
    """
    return Pipeline(open_pipeline(FileOptions(dit_path=dit_path, **options), devices))


class Pipeline:
    """Call it for videos, `stream` a causal one. `info` says what the network is and how it is sampled by default;
    `world` is what surrounds it."""

    def __init__(self, opened: Opened):
        self.opened = opened
        self.info, self.world = opened.info, opened.world
        self._colours = None

    @classmethod
    def of(cls, params: Params, info: ModelInfo, around: Surroundings | None = None) -> "Pipeline":
        """Of weights that are in memory, e.g. of a training run, on the mesh over which they are sharded; others go to
        the first device. around: what surrounds them, where that is not the built-in world."""
        if around is None and info.world != "toy":
            raise ValueError(
                f"weights of the world {info.world!r} need files around them: save them, and `load` the file"
            )
        around, mesh = around or Surroundings(ToyWorld()), mesh_of(params)
        if mesh is None:
            mesh = make_mesh(devices=jax.devices()[:1])
            params = shard(params, mesh)
        options = FileOptions(fsdp=mesh.size // mesh.shape[SEQUENCE_AXIS], sequence=mesh.shape[SEQUENCE_AXIS])
        return cls(Opened(options, info, around.world, Experts.of(params, info.model, mesh), around.files))

    @property
    def causal(self) -> bool:
        """Whether the network makes a video chunk by chunk, and can be streamed."""
        return bool(self.info.causal)

    def __call__(
        self, prompt: Prompts = None, *, progress: str = "sample", on_step: OnStep | None = None,
        time_limit: float | None = None, **options: Any,
    ) -> list[Video]:  # fmt: skip
        """`num_samples` videos of each prompt, one after the other.

        prompt: one, several, or the world's own example for None. options: fields of `SamplingOptions`, which are the
        commands' flags. progress, on_step, time_limit: see `watch.Watch`.
        Raises ArgumentError (a ValueError) that names the argument, before anything is computed, and FloatingPointError
        where weights, latents or frames are NaN or infinite.
        """
        return list(self.videos(prompt, progress=progress, on_step=on_step, time_limit=time_limit, **options))

    def videos(
        self, prompt: Prompts = None, *, progress: str = "sample", on_step: OnStep | None = None,
        time_limit: float | None = None, **options: Any,
    ) -> Iterator[Video]:  # fmt: skip
        """The same, but each video is decoded when it is asked for: one at a time need be in memory."""
        return self._videos([(prompt, options)], Watch(progress, on_step, time_limit))

    def several(
        self, calls: Sequence[tuple[Prompts, Mapping[str, Any]]], *, progress: str = "sample"
    ) -> Iterator[Video]:  # fmt: skip
        """`videos` of several calls, each its prompt and its options, as from different images: a large network is read
        once for all of them. Errors as of a call, for each of them before anything is computed."""
        return self._videos(calls, Watch(progress))

    def _videos(self, calls: Sequence[tuple[Prompts, Mapping[str, Any]]], watch: Watch) -> Iterator[Video]:
        world, asked = self.world, [SamplingOptions(**options) for _, options in calls]
        requests = [read_request(self.opened, prompt, one) for (prompt, _), one in zip(calls, asked, strict=True)]
        # of the files as they are now
        abouts = [describe(self.opened, request, one) for request, one in zip(requests, asked, strict=True)]
        # every call's text and image are read before the network comes
        sampled = [
            self._sampled(request, one, watch, features)
            for request, one, features in zip(requests, asked, self._features(requests, asked), strict=True)
        ]
        painted = self._made(list(itertools.chain.from_iterable(sampled)), requests, watch, world.paint)
        rows = (
            (words, index, about, request.seed)
            for request, of_request in zip(requests, abouts, strict=True)
            for words, index, about in zip(request.prompts, request.indices, of_request, strict=True)
        )
        return (
            Video(np.concatenate(list(parts)), world.fps, seed, words, index, world.scale, about)
            for (words, index, about, seed), parts in zip(rows, painted, strict=True)
        )

    def _features(self, requests: Sequence[Request], asked: Sequence[SamplingOptions]) -> list[Features | None]:
        """Of each request, where several are encoded together: a large encoder is read once. None: not yet read."""
        if self.causal or len(requests) == 1:
            return [None] * len(requests)
        guided = [sampler_from(one, self.info).guided for one in asked]
        texts = [[text for (text,) in request.texts] for request in requests]
        nulls = [request.negative_prompts if of else [] for request, of in zip(requests, guided, strict=True)]
        numbers = {text: i for i, text in enumerate(dict.fromkeys(itertools.chain(*texts, *nulls)))}
        rows = self.world.encode_text(list(numbers))
        return [
            (rows[[numbers[text] for text in own]], rows[[numbers[text] for text in null]] if null else None)
            for own, null in zip(texts, nulls, strict=True)
        ]

    def arrays(
        self, prompt: Prompts = None, *, progress: str = "sample", **options: Any
    ) -> Float[np.ndarray, "V F H W 3"]:
        """The same as one array in [-1, 1], before it is rounded to pixels: what scores are made of."""
        asked = SamplingOptions(**options)
        request = read_request(self.opened, prompt, asked)
        decoded = self._decoded(request, asked, Watch(progress), self.world.decode)
        return np.stack([np.concatenate(list(parts)) for parts in decoded])

    def latents(
        self, prompt: Prompts = None, *, features: Features | None = None, progress: str = "sample", **options: Any
    ) -> Float[np.ndarray, "V T H W C"]:
        """What a call decodes; the network stays in memory. features: of the prompts, a row a video, and under guidance
        of the negative prompt, where they are known. Other arguments and errors as of a call."""
        asked = SamplingOptions(**options)
        request = read_request(self.opened, prompt, asked)
        return np.concatenate(list(self._sampled(request, asked, Watch(progress), features)))

    def both(
        self, prompt: Prompts = None, *, progress: str = "sample", **options: Any
    ) -> tuple[Float[np.ndarray, "V T H W C"], UInt8[np.ndarray, "V F H W 3"]]:
        """The latents of a call, and the frames that are made of them. Arguments and errors as of a call."""
        asked, watch = SamplingOptions(**options), Watch(progress)
        request = read_request(self.opened, prompt, asked)
        latents = list(self._sampled(request, asked, watch))
        made = self._made(latents, [request], watch, self.world.paint)
        return np.concatenate(latents), np.stack([np.concatenate(list(parts)) for parts in made])

    def stream(self, prompt: Prompts = None, *, video: Source | None = None, **options: Any) -> Stream:
        """Frames of a causal network chunk by chunk, as soon as each is decoded.

        video: to repaint, read no further than the chunk that is made: a path, an array [F, H, W, 3] of uint8, or any
        iterable of such frames, e.g. a camera's, at the world's `fps`. Other arguments and errors as of a call;
        ArgumentError for a network that is not causal, and for frames that are not of the network's size.
        """
        asked, request = self._asked(prompt, video, options)
        start = start_from(self.opened, request, asked, schedule_from(asked, self.info))
        return Stream(self.opened, start, join(describe(self.opened, request, asked)))

    def streams(self, prompt: Prompts = None, **options: Any) -> Iterator[Stream]:
        """One for each video of a call, to be taken one after the other; text and image are read once for all."""
        asked, request = self._asked(prompt, None, options)
        start = start_from(self.opened, request, asked, schedule_from(asked, self.info))
        for i, about in enumerate(describe(self.opened, request, asked)):
            yield Stream(self.opened, start.rows(np.array([i])), about)

    def start(self, prompt: Prompts = None, *, video: Source | None = None, **options: Any) -> Start:
        """What a stream is made from, for those who make several at once (`pipelines.live`). Arguments and errors as of
        `stream`."""
        asked, request = self._asked(prompt, video, options)
        return start_from(self.opened, request, asked, schedule_from(asked, self.info))

    def _asked(
        self, prompt: Prompts, video: Source | None, options: dict[str, Any]
    ) -> tuple[SamplingOptions, Request]:  # fmt: skip
        """Of a stream."""
        if isinstance(video, str | Path):
            options, video = options | {"video_path": video}, None
        asked = SamplingOptions(**options)
        if not self.causal:
            raise unknown_chunks()
        return asked, read_request(self.opened, prompt, asked, video)

    def request(self, prompt: Prompts = None, **options: Any) -> Request:
        """What a call asks for, a row a video, and the videos' size. Arguments and errors as of a call."""
        return read_request(self.opened, prompt, SamplingOptions(**options))

    def check(self, prompt: Prompts = None, **options: Any) -> Request:
        """`request`, with the errors that a call has when it is worked out how the network is sampled and whether it
        fits: all that is refused before text is read."""
        asked = SamplingOptions(**options)
        request = read_request(self.opened, prompt, asked)
        if self.causal:
            causal_network(self.opened, request, asked, schedule_from(asked, self.info))
        else:
            sampler_from(asked, self.info)
            both_fit(self.opened, request)
        return request

    def preview(self, latents: Latents) -> UInt8[np.ndarray, "B T H W 3"]:
        """Pictures of latents [B, T, H, W, C], finished or half-made, a pixel for each: for `on_step`. The colours come
        through the linear map that fits this world's decoder best, found at the first call."""
        if self._colours is None:
            self._colours = fit_colours(self.world, self.info.model.out_channels)
        return to_uint8(apply_colours(self._colours, np.asarray(latents, np.float32)))

    def sampling(self, **options: Any) -> SamplerConfig | RolloutSchedule:
        """How a call with these options samples."""
        settle = schedule_from if self.causal else sampler_from
        return settle(SamplingOptions(**options), self.info)

    def _decoded(self, request: Request, asked: SamplingOptions, watch: Watch, make: Make) -> Iterator[Iterator[Part]]:
        """For every video what `make` makes of it, in parts. Latents are sampled here, frames made when asked for: so a
        large network has gone before the autoencoder comes."""
        return self._made(list(self._sampled(request, asked, watch)), [request], watch, make)

    def _made(
        self, latents: list[Latents], requests: Sequence[Request], watch: Watch, make: Make
    ) -> Iterator[Iterator[Part]]:  # fmt: skip
        """Of latents that are there; the network goes first."""
        if not self.world.small:
            self.opened.experts.release()
        names = [name for request in requests for name in _names(request)]
        return self._frames(latents, names, make, watch.progress and f"{watch.progress}: decoding")

    def _sampled(
        self, request: Request, asked: SamplingOptions, watch: Watch, features: Features | None = None
    ) -> Iterator[Latents]:
        """Text and image are read here, the network when the first batch is asked for."""
        if self.causal:
            start = start_from(self.opened, request, asked, schedule_from(asked, self.info))
            return _finite_batches(roll_out_request(self.opened, start, watch), request)
        sampler = sampler_from(asked, self.info)
        given = read_conditions(self.opened, request, sampler, features)
        return _finite_batches(sample_request(self.opened, request, sampler, given, watch), request)

    def _frames(
        self, latents: list[Latents], names: list[str], make: Make, words: str
    ) -> Iterator[Iterator[Part]]:  # fmt: skip
        """Every video's frames in parts; after the last one the world's decoder goes, so that a network may come."""
        decoded = itertools.chain.from_iterable(map(make, latents))
        for name, parts in zip(names, decoded, strict=True):
            yield _finite_parts(parts, name, words)
        self.world.release()


def _finite_batches(batches: Iterator[Latents], request: Request) -> Iterator[Latents]:
    names = iter(_names(request))
    for batch in batches:
        for video in batch:
            check_finite(video, f"latents of {next(names)}")
        yield batch


def _finite_parts(parts: Iterator[Pixels | Painted], name: str, words: str) -> Iterator[Part]:
    with waiting(words):  # the first compiles; the others are quick, or the world shows how far it is
        first = list(itertools.islice(parts, 1))
    for part in itertools.chain(first, parts):
        yield checked(part, f"frames of {name}, decoded from finite latents")


def _names(request: Request) -> list[str]:
    """Of its videos, for errors."""
    return [f"video {i} ({words!r}, seed {request.seed})" for i, words in enumerate(request.prompts)]
