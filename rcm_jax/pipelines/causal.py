"""Causal video: whole rollouts, and streams whose frames come chunk by chunk."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from rcm_jax.causal.network import CausalDiT
from rcm_jax.finite import check_finite
from rcm_jax.media.pictures import to_uint8
from rcm_jax.objectives.config import CausalConfig
from rcm_jax.parallel import SEQUENCE_AXIS
from rcm_jax.pipelines.opening import Opened
from rcm_jax.pipelines.options import SamplingOptions
from rcm_jax.pipelines.request import SMALL_BATCH, Request, batch_rows
from rcm_jax.pipelines.watch import Watch
from rcm_jax.progress import Progress
from rcm_jax.sampling.noise import video_noises
from rcm_jax.sampling.rollout import rollout
from rcm_jax.sampling.schedules import RolloutSchedule
from rcm_jax.sampling.stream import Decode, stream
from rcm_jax.tensor_stream import on_host
from rcm_jax.types import Latents, Params, Text


class Start(NamedTuple):
    """Everything that a causal video is made from, but the weights. null_text: under guidance alone, one row a video.
    image: latents of the first frame, or None. frames: how many latent frames."""

    network: CausalDiT
    schedule: RolloutSchedule
    text: Float[np.ndarray, "V L D"]
    null_text: Float[np.ndarray, "V L D"] | None
    image: Float[np.ndarray, "V 1 H W C"] | None
    indices: Sequence[int]
    seed: int
    frames: int

    @property
    def chunks(self) -> int:
        return len(self.network.pattern.spans(self.frames))

    def rows(self, which: np.ndarray) -> "Start":
        """Those of the videos."""
        null, image = (None if x is None else x[which] for x in (self.null_text, self.image))
        indices = np.asarray(self.indices)[which]
        return self._replace(text=self.text[which], null_text=null, image=image, indices=indices)


def causal_network(opened: Opened, request: Request, asked: SamplingOptions, schedule: RolloutSchedule) -> CausalDiT:
    """For the video that is asked for. Raises ValueError for chunks, a window or a schedule that do not fit it."""
    changes = {"window": asked.window, "sink": asked.sink}
    settings = opened.info.causal | {name: value for name, value in changes.items() if value is not None}
    network = CausalConfig(**settings).network(opened.experts.dit, request.latent_shape)
    schedule.check_chunks(len(network.pattern.spans(request.latent_shape[0])))
    return asked.quantised(network, opened.experts.mesh.shape[SEQUENCE_AXIS])


def start_from(opened: Opened, request: Request, asked: SamplingOptions, schedule: RolloutSchedule) -> Start:
    """Reads text and image. Raises as `causal_network`, before text is read."""
    network = causal_network(opened, request, asked, schedule)
    text, null_text = request.features(opened.world, guided=schedule.guidance > 1)
    if null_text is not None:
        null_text = np.broadcast_to(null_text, text.shape)
    image = None
    if request.image is not None:
        first = opened.world.first_latent(request.image, request.size)
        image = np.repeat(first, len(request.prompts), axis=0)
    return Start(
        network, schedule, text, null_text, image, request.indices, request.seed, request.latent_shape[0]
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("network", "schedule", "frames"))
def _rollout(
    network: CausalDiT, schedule: RolloutSchedule, frames: int, params: Params, text: Text, null_text: Array | None,
    image: Latents | None, seed: Array, indices: Array,
) -> Latents:  # fmt: skip
    noises = video_noises(network, schedule, seed, indices)
    return rollout(network, params, text, noises, schedule, frames=frames, null_text=null_text, image=image)


def roll_out_request(opened: Opened, start: Start, watch: Watch) -> Iterator[Float[np.ndarray, "b T H W C"]]:
    """Latents of whole videos: of a small network each batch is one program; of a large one, or where every step is
    watched, all videos go chunk by chunk."""
    params, mesh = opened.experts.params(), opened.experts.mesh
    if not opened.world.small or watch.on_step is not None:
        parts = []
        with Progress(watch.progress, start.chunks, "chunk", limit=watch.time_limit, delay=2) as progress:
            for part in _chunks(params, start, lambda latents, state: (latents, state), mesh):
                parts.append(on_host(part))
                progress.update()
                watch.step(np.concatenate(parts, axis=1), progress.done, start.chunks)
        yield np.concatenate(parts, axis=1)
        return
    count = len(start.text)
    batches = batch_rows(count, min(SMALL_BATCH, count))
    with Progress(watch.progress, len(batches), "batch", limit=watch.time_limit) as progress:
        for rows in batches:
            batch = start.rows(rows)
            with jax.set_mesh(mesh):
                latents = _rollout(
                    start.network, start.schedule, start.frames, params, batch.text, batch.null_text, batch.image,
                    np.uint32(start.seed), np.asarray(batch.indices),
                )  # fmt: skip
            latents = on_host(latents)
            progress.update()
            yield latents[: count - rows[0]]


def _chunks(
    params: Params, start: Start, decode: Decode, mesh: Mesh, texts: list | None = None
) -> Iterator[np.ndarray]:
    """What `decode` gives, chunk by chunk. The mesh is set while a chunk is made, not while it is looked at. A text put
    into `texts` replaces the prompt of all chunks not yet begun."""
    if texts:  # a stream that has not begun begins with the new prompt
        start = start._replace(text=texts[-1])
        texts.clear()
    with jax.set_mesh(mesh):
        noises = video_noises(start.network, start.schedule, start.seed, start.indices)
        parts = stream(
            start.network, params, start.text, noises, start.schedule, decode, chunks=start.chunks,
            null_text=start.null_text, image=start.image,
        )  # fmt: skip
    try:
        while True:
            with jax.set_mesh(mesh):
                while texts:
                    parts.send(texts.pop(0))
                part = next(parts, None)
            if part is None:
                return
            yield part
    finally:
        parts.close()


class Stream:
    """A video while it is made: uint8 frames [num_samples, f, H, W, 3] of one chunk after the other.

    for part in stream:
        ...
        stream.send("another prompt")      # of all chunks not yet begun; the next one has

    Every loop over it starts the same video anew; text and image are read once. fps: frames a second.
    about: how it is made, for a file's comment.
    """

    def __init__(self, opened: Opened, start: Start, about: dict[str, Any]):
        self.start, self.world, self.fps, self.about = start, opened.world, opened.world.fps, about
        self._params, self._mesh, self._decode = opened.experts.params(), opened.experts.mesh, self.world.decoder()
        self._texts: list[Any] = []

    @property
    def chunk_frames(self) -> tuple[int, int]:
        """Latent frames of the first chunk, and of the others."""
        return self.start.network.pattern.first, self.start.network.pattern.rest

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "B f H W 3"]]:
        self._texts.clear()
        parts = _chunks(self._params, self.start, self._decode, self._mesh, self._texts)
        return (to_uint8(check_finite(part, f"frames of chunk {i}")) for i, part in enumerate(parts))

    def send(self, prompt: str) -> None:
        """Raises ValueError for a prompt that the world cannot read."""
        features = self.world.encode_text([prompt])
        self._texts.append(np.repeat(features, len(self.start.text), axis=0))
