"""Videos without an end, each for a reader of its own, made side by side: one pass of the network for those that fit.

    live = Live(pipe, "a red circle moving left", cache_policy="infinity_rope")
    [part] = advance([live])         # Painted frames of its next chunk, on the device
    live.say("a blue square moving up")

What is said or changed holds from the next chunk on.
"""

import functools
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.model_file import ModelInfo
from rcm_jax.pipelines.incoming import chunk_sizes
from rcm_jax.pipelines.options import SamplingOptions
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.pipelines.settings import schedule_from
from rcm_jax.sampling.course import Course
from rcm_jax.sampling.noise import video_noises
from rcm_jax.sampling.prompts import Cut
from rcm_jax.sampling.recache import Recache
from rcm_jax.sampling.stream import condition_caches, open_caches, prompt_keys
from rcm_jax.sampling.together import Row, Steps, sample_together
from rcm_jax.types import Latents
from rcm_jax.worlds.painted import Painted

TOGETHER = (16, 8, 4, 2, 1)  # streams in a pass: few programs serve any number
AT_ONCE = ("seed", "num_steps", "mid_t", "steps_per_chunk", "mid_t_schedules", "shift")  # others change what is cached


def endless_policy(info: ModelInfo) -> dict[str, Any]:
    """What is kept of a video without an end where nothing says it: with the chunk that is made as many chunks as a
    video of the network's own length has, the first of them for good. Of the published policies this kept the built-in
    world's videos best (docs/causal.md)."""
    chunks = len(ChunkPattern.parse(info.causal["pattern"]).spans(info.latent_shape[0]))
    return {"cache_policy": "sliding_window", "window_blocks": max(2, chunks - 1), "sw_sink_blocks": 1}


class Pushed:
    """Frames [H, W, 3] of uint8 that somebody brings while they are used, e.g. a camera's."""

    def __init__(self) -> None:
        self.closed = False
        self._frames: deque[UInt8[np.ndarray, "H W 3"]] = deque()

    def push(self, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        self._frames.append(frame)

    def close(self) -> None:
        """There are no more."""
        self.closed = True

    def __len__(self) -> int:
        """How many are waiting."""
        return len(self._frames)

    def frames(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Those that wait, and no longer than there are any."""
        while self._frames:
            yield self._frames.popleft()


class Live:
    """One of them. prompt, options: as of `Pipeline.stream`, for one video. pushed: input video, in place of noise.

    Raises what `stream` raises, and ArgumentError for what is no endless video's.
    """

    def __init__(self, pipe: Pipeline, prompt: str | None, *, pushed: Pushed | None = None, **options: Any):
        self.pipe, self.prompt, self.pushed = pipe, prompt or pipe.world.prompt, pushed
        asked = SamplingOptions(**options)
        if asked.stream_batch:
            raise ArgumentError(
                "{stream_batch} does not apply: streams of several readers are batched", stream_batch=None
            )
        if asked.num_samples > 1:
            raise ArgumentError("{num_samples} must be 1: every reader has a video", num_samples=asked.num_samples)
        self.params = pipe.opened.experts.params()
        self._open(options)

    def _open(self, options: dict[str, Any]) -> None:
        """From the first chunk on, anew."""
        video = None if self.pushed is None else self.pushed.frames()
        self.start = self.pipe.start(self.prompt, video=video, **options)
        self._options, self.asked = options, SamplingOptions(**options)
        self.index, self._state, self._decode = 0, None, self.pipe.world.decoder()
        start, network = self.start, self.start.network
        self.mesh = self.pipe.opened.experts.mesh
        renew = None if start.recache is None else Recache(network, self.params, start.recache)
        with jax.set_mesh(self.mesh):
            self._settle()
            prompts, caches = open_caches(network, self.params, start.script.at(0), start.null_text, start.schedule)
            if start.image is not None:
                noise = self._noises(jnp.int32(0), 1)[0]
                caches = condition_caches(network, start.schedule, self.params, prompts, caches, start.image, noise)
            self._begins = start.incoming and start.incoming.begins(self.mesh)
        keys = functools.partial(prompt_keys, network, self.params)
        self._course = Course(keys, start.script, prompts, caches, network.keeps, renew)

    def _settle(self) -> None:
        """The noises of the seed and the schedule."""
        start = self.start
        self._noises = video_noises(start.network, start.schedule, start.seed, start.indices)

    # --- what may be said ---------------------------------------------------------------------------------------------

    def say(self, prompt: str, *, cut: bool = False) -> None:
        """Raises ValueError for a prompt that the world cannot read, or a cut where the cache has none."""
        text = self.pipe.world.encode_text([prompt])
        with jax.set_mesh(self.mesh):
            self._course.say(self.index, Cut(text) if cut else text)
        self.prompt = prompt

    def change(self, **options: Any) -> None:
        """All options, of the chunks to come. The seed and the steps change on the way; what concerns the cache begins
        the video anew. Raises as the constructor; nothing has changed then."""
        other = {name for name in options | self._options if options.get(name) != self._options.get(name)}
        if other <= set(AT_ONCE):
            asked = SamplingOptions(**options)
            schedule = schedule_from(asked, self.pipe.info)
            if self.start.incoming is not None:
                schedule = self.start.incoming.noise.schedule(schedule)
            self.start = self.start._replace(schedule=schedule, seed=asked.seed)
            self.asked, self._options = asked, options
            self._settle()
            return
        before = self._course
        self._open(options)
        before.free()

    # --- chunks -------------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether there are no more chunks: the network keeps all of the past and has no room left."""
        room = self.start.network.room
        return room is not None and self.index >= len(self.start.network.pattern.spans(room))

    @property
    def wanted(self) -> int:
        """Frames of input that the next chunk waits for."""
        if self.pushed is None or self.pushed.closed:
            return 0
        first, rest = self.chunk_frames
        return max(0, (rest if self.index else first) - len(self.pushed))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its frames, and of input."""
        asked = self.asked
        return self.pipe.world.size(asked.resolution, asked.aspect_ratio, asked.size, None)

    @property
    def chunk_frames(self) -> tuple[int, int]:
        """Frames of the first chunk, and of the others."""
        return chunk_sizes(self.pipe.world, self.pipe.info)

    @property
    def settings(self) -> dict[str, Any]:
        """What may be changed, as it is. Of input video fewer steps than these may be left, where it begins with little
        noise."""
        schedule = schedule_from(self.asked, self.pipe.info)
        times, _ = schedule.chunk(self.index)
        names = ("cache_policy", "noise_scale", "noise_rule", "prompt_blend")
        return {
            "seed": self.start.seed, "num_steps": len(times) - 1,
            "guidance_scale": schedule.guidance if schedule.ode else None, **{n: getattr(self.asked, n) for n in names},
        }  # fmt: skip

    @property
    def frames(self) -> int:
        """Latent frames of the next chunk."""
        pattern = self.start.network.pattern
        return pattern.rest if self.index else pattern.first

    @property
    def steps(self) -> Steps:
        """Of the next chunk."""
        schedule = self.start.schedule
        return Steps(schedule.chunk(self.index)[1], schedule.ode, schedule.guidance)

    def kind(self) -> Hashable:
        """What chunks that are made together have in common."""
        times, _ = self.start.schedule.chunk(self.index)
        return self.start.network, self.frames, len(times), self.steps, self.pushed is None

    def row(self) -> Row | Latents | None:
        """What the next chunk is made from; an image is made already. None: the input has ended."""
        self._course.turn(self.index)
        if self.index == 0 and self.start.image is not None:
            return self.start.image
        (times, _), chunk = self.start.schedule.chunk(self.index), jnp.int32(self.index)
        noises, start = self._noises(chunk, self.frames), None
        if self._begins is not None:
            begin = self._begins(self.index, noises[0], times)
            if begin is None:
                return None
            start, times = begin
        return Row(self._course.prompts, self._course.caches, chunk, noises, jnp.asarray(times, jnp.float32), start)

    def put(self, x: Latents, caches: Any = None) -> Painted:
        """The chunk's frames; the next one is the next."""
        self._course.put(x, self._course.caches if caches is None else caches)
        part, self._state = self._decode(x, self._state)
        self.index += 1
        return part

    def close(self) -> None:
        """Its cache leaves the device."""
        self._course.free()


Made = Painted | Exception | None


def advance(lives: Sequence[Live], together: Sequence[int] = TOGETHER) -> list[Made]:
    """A chunk of each, on its way: frames [1, f, H, W, 3]; None where a video has ended; what went wrong with one.

    together: how many may be in one pass, largest first, the last 1.
    """
    made: dict[int, Made] = {}
    groups: dict[Hashable, list[tuple[int, Row]]] = defaultdict(list)
    for i, live in enumerate(lives):
        try:
            with jax.set_mesh(live.mesh):
                row, kind = (None, None) if live.ended else (live.row(), live.kind())
                if isinstance(row, Row):
                    groups[kind].append((i, row))
                else:
                    made[i] = None if row is None else live.put(row)
        except Exception as error:  # of this video alone
            made[i] = error
    for group in groups.values():
        for part in _parts(group, together if lives[0].mesh.size == 1 else (1,)):  # rows lie on one device
            made |= _made_together([(i, lives[i], row) for i, row in part])
    return [made[i] for i in range(len(lives))]


def _parts(group: list, sizes: Sequence[int]) -> Iterator[list]:
    while group:
        count = next(n for n in sizes if n <= len(group))
        yield group[:count]
        group = group[count:]


def _made_together(rows: list[tuple[int, Live, Row]]) -> dict[int, Made]:
    _, first, _ = rows[0]
    made: dict[int, Made] = {}
    try:
        with jax.set_mesh(first.mesh):
            results = sample_together(first.start.network, first.params, [row for *_, row in rows], first.steps)
    except Exception as error:
        return {i: error for i, *_ in rows}
    for (i, live, _), (x, caches) in zip(rows, results, strict=True):
        try:
            with jax.set_mesh(live.mesh):
                made[i] = live.put(x, caches)
        except Exception as error:
            made[i] = error
    return made
