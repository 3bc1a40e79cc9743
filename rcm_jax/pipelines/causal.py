"""Causal video: whole rollouts, and streams whose frames come chunk by chunk."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from rcm_jax.causal.cache import Ring
from rcm_jax.causal.network import CausalDiT
from rcm_jax.causal.sinks import check_cuts
from rcm_jax.causal.slots import SlotRing
from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.kernels.target import target
from rcm_jax.objectives.config import CausalConfig
from rcm_jax.parallel import SEQUENCE_AXIS
from rcm_jax.pipelines.incoming import Incoming, chunk_sizes
from rcm_jax.pipelines.networks import Experts
from rcm_jax.pipelines.opening import Opened
from rcm_jax.pipelines.options import SamplingOptions
from rcm_jax.pipelines.request import SMALL_BATCH, Request, batch_rows
from rcm_jax.pipelines.settings import input_noise
from rcm_jax.pipelines.watch import Watch
from rcm_jax.progress import Progress
from rcm_jax.sampling.noise import video_noises
from rcm_jax.sampling.prompts import Cut, PromptSchedule, Script
from rcm_jax.sampling.rollout import rollout
from rcm_jax.sampling.schedules import RolloutSchedule
from rcm_jax.sampling.stream import Decode, stream
from rcm_jax.sampling.stream_batch import stream_batch
from rcm_jax.tensor_stream import on_host
from rcm_jax.types import Latents, Params, Text
from rcm_jax.wan.dit import DiT
from rcm_jax.worlds.painted import checked


class Start(NamedTuple):
    """Everything that a causal video is made from, but the weights. texts: of the prompts that the videos follow one
    after the other, as `changes` says. null_text: under guidance alone, one row a video. image: latents of the first
    frame, or None. frames: how many latent frames. incoming: where chunks begin instead of noise; endless: until that
    ends. recache: see `stream`. ring: the cache of a stream batch, or of its steps one_by_one."""

    network: CausalDiT
    schedule: RolloutSchedule
    texts: tuple[Float[np.ndarray, "V L D"], ...]
    changes: PromptSchedule
    null_text: Float[np.ndarray, "V L D"] | None
    image: Float[np.ndarray, "V 1 H W C"] | None
    indices: Sequence[int]
    seed: int
    frames: int
    incoming: Incoming | None = None
    endless: bool = False
    recache: str | None = None
    ring: SlotRing | None = None
    one_by_one: bool = False

    @property
    def chunks(self) -> int | None:
        """None where nobody knows."""
        return None if self.endless else len(self.network.pattern.spans(self.frames))

    @property
    def text(self) -> Float[np.ndarray, "V L D"]:
        """Of the first prompt."""
        return self.texts[0]

    @property
    def script(self) -> Script:
        return Script(self.texts, self.changes)

    def rows(self, which: np.ndarray) -> "Start":
        """Those of the videos."""
        null, image = (None if x is None else x[which] for x in (self.null_text, self.image))
        texts, indices = tuple(text[which] for text in self.texts), np.asarray(self.indices)[which]
        return self._replace(texts=texts, null_text=null, image=image, indices=indices)

    def following(self, text: Float[np.ndarray, "V L D"] | Cut) -> "Start":
        """One text from the first chunk on, in place of all others."""
        script = self.script.sent(0, text)
        return self._replace(texts=script.texts, changes=script.schedule)


def causal_network(opened: Opened, request: Request, asked: SamplingOptions, schedule: RolloutSchedule) -> CausalDiT:
    """For the video that is asked for. Raises ValueError for chunks, a window or a schedule that do not fit it."""
    changes = {name: value for name in ("window", "sink") if (value := getattr(asked, name)) is not None}
    policy = asked.policy(request.changes.cuts)
    if policy is not None and changes:
        name = next(iter(changes))
        raise ArgumentError(
            f"{{{name}}} is of the cache as it was trained; with {{cache_policy}} give that policy's own settings",
            **{name: None}, cache_policy=asked.cache_policy,
        )  # fmt: skip
    network = CausalConfig(**opened.info.causal | changes).network(_written_out(opened.experts), request.latent_shape)
    network = asked.quantised(dataclasses.replace(network, policy=policy), opened.experts.mesh.shape[SEQUENCE_AXIS])
    if asked.prompt_recache is not None and not isinstance(network.keeps, Ring):
        raise ArgumentError(
            "{prompt_recache} takes a cache of the last chunks, or of all, in full width: without {cache_policy} other "
            "than sliding_window, and without {kv_dtype_k} and its like", prompt_recache=asked.prompt_recache,
            cache_policy=None, kv_dtype_k=None,
        )  # fmt: skip
    schedule.check_chunks(len(network.pattern.spans(request.latent_shape[0])))
    return network


def _written_out(experts: Experts) -> DiT:
    """The network with its layers one after the other in the program, on GPUs: a loop over them copies every layer's
    weights out of their stack, each pass, before a product reads them."""
    dit = experts.dit
    with jax.set_mesh(experts.mesh):
        if not target().is_gpu:
            return dit
    return dit.clone(config=dataclasses.replace(dit.config, unroll=dit.config.num_layers))


def _ring(opened: Opened, asked: SamplingOptions, schedule: RolloutSchedule) -> SlotRing | None:
    """The cache of a stream batch, where one is asked for."""
    if asked.stream_batch and not asked.cache_quant.exact:
        raise ArgumentError("{stream_batch} keeps keys as they are: leave out {kv_dtype_k} and its like",
                            stream_batch=None, kv_dtype_k=None)  # fmt: skip
    return asked.ring(schedule, ChunkPattern.parse(opened.info.causal["pattern"]), opened.experts.mesh.size)


def start_from(opened: Opened, request: Request, asked: SamplingOptions, schedule: RolloutSchedule) -> Start:
    """Reads text and image. Raises as `causal_network`, before text is read."""
    noise, ring = None if request.video is None else input_noise(asked, opened.info), _ring(opened, asked, schedule)
    if noise is not None:
        schedule = noise.schedule(schedule)
    network = causal_network(opened, request, asked, schedule)
    text, null_text = request.features(opened.world, guided=schedule.guidance > 1)
    if null_text is not None:
        null_text = np.broadcast_to(null_text, (len(request.prompts), *text.shape[1:]))
    image = None
    if request.image is not None:
        first = opened.world.first_latent(request.image, request.size)
        image = np.repeat(first, len(request.prompts), axis=0)
    incoming = None
    if noise is not None:
        incoming = Incoming(request.video, noise, chunk_sizes(opened.world, opened.info), opened.world.encoder())
    return Start(
        network, schedule, tuple(np.split(text, len(request.changes.starts))), request.changes, null_text, image,
        request.indices, request.seed, request.latent_shape[0], incoming, request.endless, asked.prompt_recache,
        ring, asked.one_by_one,
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
    watched, all videos go chunk by chunk; where prompts change, or from input video, chunk
    by chunk too, a batch after the other."""
    params, mesh, count = opened.experts.params(), opened.experts.mesh, len(start.text)
    batches = batch_rows(count, min(SMALL_BATCH, count))
    if not opened.world.small or watch.on_step is not None:
        batches = [np.arange(count)]
    elif len(start.texts) == 1 and start.incoming is None:
        yield from _whole(params, mesh, start, batches, watch)
        return
    total = None if start.chunks is None else len(batches) * start.chunks
    with Progress(watch.progress, total, "chunk", limit=watch.time_limit, delay=2) as progress:
        for rows in batches:
            parts = []
            for part in _chunks(params, start.rows(rows), lambda latents, state: (latents, state), mesh):
                parts.append(on_host(part))
                progress.update()
                watch.step(np.concatenate(parts, axis=1), progress.done, total)
            yield np.concatenate(parts, axis=1)[: count - rows[0]]


def _whole(
    params: Params, mesh: Mesh, start: Start, batches: Sequence[np.ndarray], watch: Watch
) -> Iterator[Float[np.ndarray, "b T H W C"]]:
    """Each batch by one program."""
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
            yield latents[: len(start.text) - rows[0]]


def _chunks(params: Params, start: Start, decode: Decode, mesh: Mesh, sent: list | None = None) -> Iterator[np.ndarray]:
    """What `decode` gives, chunk by chunk. The mesh is set while a chunk is made, not while it is looked at. A text put
    into `sent` replaces the prompt of all chunks not yet begun."""
    if sent:  # a stream that has not begun begins with the new prompt
        start = start.following(sent[-1])
        sent.clear()
    with jax.set_mesh(mesh):
        noises = video_noises(start.network, start.schedule, start.seed, start.indices)
        begins = start.incoming and start.incoming.begins(mesh)
        if start.ring is not None:
            parts = stream_batch(
                start.network, start.ring, params, start.script, noises, start.schedule, decode, begins,
                chunks=start.chunks, one_by_one=start.one_by_one, levels=start.incoming.noise.levels,
            )  # fmt: skip
        else:
            parts = stream(
                start.network, params, start.script, noises, start.schedule, decode, chunks=start.chunks,
                null_text=start.null_text, image=start.image, begins=begins, recache=start.recache,
            )  # fmt: skip
    try:
        while True:
            with jax.set_mesh(mesh):
                while sent:
                    parts.send(sent.pop(0))
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
        stream.send("another", cut=True)   # and the first of them begins a scene, where the cache policy has cuts

    A prompt that is sent takes the place of all that were planned for later, and blends in as they would have.
    Every loop over it starts the same video anew; text and image are read once. fps: frames a second.
    about: how it is made, for a file's comment.
    """

    def __init__(self, opened: Opened, start: Start, about: dict[str, Any]):
        self.start, self.world, self.fps, self.about = start, opened.world, opened.world.fps, about
        self._params, self._mesh, self._decode = opened.experts.params(), opened.experts.mesh, self.world.decoder()
        self._sent: list[Any] = []

    @property
    def chunk_frames(self) -> tuple[int, int]:
        """Latent frames of the first chunk, and of the others."""
        return self.start.network.pattern.first, self.start.network.pattern.rest

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "B f H W 3"]]:
        self._sent.clear()
        parts = _chunks(self._params, self.start, self._decode, self._mesh, self._sent)
        return (checked(part, f"frames of chunk {i}") for i, part in enumerate(parts))

    def send(self, prompt: str, *, cut: bool = False) -> None:
        """Raises ValueError for a prompt that the world cannot read, and for a cut where the cache has none."""
        if cut:
            check_cuts(self.start.ring or self.start.network.keeps)
        text = np.repeat(self.world.encode_text([prompt]), len(self.start.text), axis=0)
        self._sent.append(Cut(text) if cut else text)
