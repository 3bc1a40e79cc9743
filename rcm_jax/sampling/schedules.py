"""At which times each chunk of a causal video is sampled: a student's few steps, or a teacher's ODE."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from rcm_jax.chunks import Spans
from rcm_jax.flow import shift_time, unshift_time

MIDDLE = (15 / 16, 5 / 6, 5 / 8)  # RF times between the first step and the data
SIGMA_MAX = 1600.0

Times = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class RolloutSchedule:
    """How each chunk is sampled.

    times: RF times of the chunks' steps, noise first, the last 0; the last entry serves all further chunks.
    noisy_context_from: from this chunk on, the last denoising pass gives the cache its keys. None: never.
    ode: integrate the velocity, without fresh noise (a causal teacher).
    guidance: of an ODE; 1 or less runs no unconditional pass.
    """

    times: tuple[Times, ...]
    noisy_context_from: int | None = None
    ode: bool = False
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not self.times:
            raise ValueError("a rollout needs the times of at least one chunk")
        for chunk, times in enumerate(self.times):
            falling = all(a > b for a, b in itertools.pairwise(times))
            if len(times) < 2 or times[-1] != 0 or times[0] > 1 or not falling:
                raise ValueError(f"times of chunk {chunk} are {times}; they must fall from at most 1 to 0")
        if self.noisy_context_from is not None and self.noisy_context_from < 0:
            raise ValueError(f"noisy_context_from={self.noisy_context_from} must be a chunk, 0 or more")

    def chunk(self, index: int) -> tuple[Times, bool]:
        """(times, whether the context is noisy) of a chunk."""
        noisy = self.noisy_context_from is not None and index >= self.noisy_context_from
        return self.times[min(index, len(self.times) - 1)], noisy

    def passes(self, spans: Spans) -> float:
        """How often the network goes over each frame of a video, in the mean over its chunks: their steps, and once
        more to put a chunk's keys into the cache where the last step does not; all of it twice under guidance."""
        over = 0
        for index, (start, end) in enumerate(spans):
            times, noisy = self.chunk(index)
            over += (end - start) * (len(times) - noisy)
        return over / spans[-1][1] * (2 if self.guidance > 1 else 1)

    def after_image(self) -> "RolloutSchedule":
        """For image-to-video, where the entries of `times` count the chunks after the image."""
        return dataclasses.replace(self, times=(self.times[0], *self.times))

    def check_chunks(self, count: int) -> None:
        """Raises ValueError where the schedule asks for more chunks than a video has."""
        if len(self.times) > count:
            raise ValueError(f"the schedule has times for {len(self.times)} chunks; the video has {count}")
        if self.noisy_context_from is not None and self.noisy_context_from >= count:
            raise ValueError(f"noisy_context_from={self.noisy_context_from} is beyond the last chunk, {count - 1}")


def few_step_schedule(
    steps: Sequence[int] = (4,),
    *,
    middle: Sequence[float] = MIDDLE,
    middle_by_entry: Sequence[Sequence[float]] | None = None,
    sigma_max: float = SIGMA_MAX,
    noisy_context_from: int | None = None,
) -> RolloutSchedule:
    """A student's schedule: `steps` of the chunks (the last entry repeats), from t = sigma_max/(sigma_max + 1) to 0.

    Between them the first steps - 1 of `middle`, or, one list an entry of `steps`, `middle_by_entry`.
    Raises ValueError for lists of the wrong length.
    """
    if middle_by_entry is None:
        for n in steps:
            if not 1 <= n <= len(middle) + 1:
                raise ValueError(f"{n} steps must be 1..{len(middle) + 1}: one more than the middle times {middle}")
        middle_by_entry = [middle[: n - 1] for n in steps]
    if len(middle_by_entry) != len(steps):
        raise ValueError(f"{len(middle_by_entry)} schedules of middle times for {len(steps)} step counts {steps}")
    for n, times in zip(steps, middle_by_entry, strict=True):
        if len(times) != n - 1:
            raise ValueError(f"{n} steps need {n - 1} middle times, not {len(times)}: {tuple(times)}")
    first = 1.0 if math.isinf(sigma_max) else sigma_max / (sigma_max + 1)
    return RolloutSchedule(tuple((first, *map(float, times), 0.0) for times in middle_by_entry), noisy_context_from)


def ode_schedule(
    num_steps: int = 50, *, shift: float = 3.0, guidance: float = 3.0, sigma_max: float = SIGMA_MAX
) -> RolloutSchedule:
    """A causal teacher's: `num_steps` Euler steps over shifted times from sigma_max/(sigma_max + 1), with guidance."""
    if num_steps < 1:
        raise ValueError(f"{num_steps=} must be at least 1")
    start = unshift_time(sigma_max / (sigma_max + 1), shift)
    times = shift_time(np.linspace(start, 0, num_steps + 1), shift)
    return RolloutSchedule((tuple(times.tolist()),), ode=True, guidance=guidance)
