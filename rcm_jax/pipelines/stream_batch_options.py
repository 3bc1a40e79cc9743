"""StreamDiffusionV2's stream batch as a mode of video to video: flags under their published names."""

import dataclasses

from rcm_jax.causal.slots import OFF, SlotRing
from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.pipelines.kinds import causal
from rcm_jax.ranges import at_least, between
from rcm_jax.sampling.schedules import RolloutSchedule

SETTINGS = ("num_kv_cache", "num_sink_tokens", "adapt_sink_threshold")
OTHERS = {  # of the ordinary cache, and why each does not apply
    "window": "has a cache of its own",
    "sink": "has a cache of its own",
    "cache_policy": "has a cache of its own",
    "prompt_recache": "has no keys that could be made anew",
    "context_from_last_step": "leaves every step's own keys",
    "context_from_last_step_start_chunk": "leaves every step's own keys",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamBatchOptions:
    """Whether the steps of neighbouring chunks of input video go through the network together, and on which cache."""

    stream_batch: bool = causal(
        False, "of input video: the steps of neighbouring chunks in one pass, on a cache of a few latent frames "
        "(StreamDiffusionV2); frames come steps - 1 chunks later",
    )  # fmt: skip
    one_by_one: bool = causal(False, "stream_batch: the same cache, but a chunk's steps one after another, at once")
    num_kv_cache: int | None = causal(None, "stream_batch: latent frames that are cached (6)", range=at_least(1))
    num_sink_tokens: int | None = causal(
        None, "stream_batch: first ones of them that stay, counted in latent frames (3)", range=at_least(0)
    )
    adapt_sink_threshold: float | None = causal(
        None, "stream_batch: of those, the one least like a new frame is replaced where their cosine is below this, in "
        "chunks of one latent frame (0.2); -1: never", range=between(-1, 1),
    )  # fmt: skip

    def ring(self, schedule: RolloutSchedule, pattern: ChunkPattern, devices: int) -> SlotRing | None:
        """The cache that is asked for, of a network of so many devices; None without a stream batch. Raises
        ArgumentError for its settings without it, and for what does not go with it."""
        if not self.stream_batch:
            for name in ("one_by_one", *SETTINGS):
                if getattr(self, name) not in (None, False):
                    raise ArgumentError(
                        f"{{{name}}} is for a stream batch: give {{stream_batch}}", **{name: None, "stream_batch": None}
                    )
            return None
        for name, why in OTHERS.items():
            if getattr(self, name) is not None:
                raise ArgumentError(f"{{{name}}} does not apply: {{stream_batch}} {why}", **{name: None},
                                    stream_batch=None)  # fmt: skip
        given = {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}
        self._check(schedule, pattern, devices)
        ring = SlotRing(**given)
        ring.check(pattern)
        return ring

    def _check(self, schedule: RolloutSchedule, pattern: ChunkPattern, devices: int) -> None:
        if schedule.ode:
            raise ArgumentError(
                "{stream_batch} is few-step sampling, of a student; {kind} overrules that", stream_batch=None, kind=None
            )
        if len(schedule.times) > 1:
            raise ArgumentError("{stream_batch} takes all chunks down the same steps: give {num_steps}",
                                stream_batch=None, num_steps=None)  # fmt: skip
        if devices > 1:
            raise ArgumentError("{stream_batch} is for one GPU: {fsdp} and {sequence} must be 1", stream_batch=None,
                                fsdp=None, sequence=None)  # fmt: skip
        if pattern.rest > 1 and self.adapt_sink_threshold not in (None, OFF):
            raise ArgumentError(
                f"{{adapt_sink_threshold}} is for chunks of one latent frame; the network's are {pattern}",
                adapt_sink_threshold=self.adapt_sink_threshold,
            )  # fmt: skip
