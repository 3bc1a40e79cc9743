"""What is minimised, as frozen dataclasses: the method, its time samplers, and the causal settings."""

import dataclasses
import math

from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkPattern, Spans
from rcm_jax.flow import LogNormal, TimeSampler, Truncated, UniformShift, unshift_time
from rcm_jax.losses.forcing import DF_TIMES, WEIGHTINGS
from rcm_jax.ranges import FINITE, POSITIVE, at_least, between, check_settings
from rcm_jax.sampling.few_step import sampler_times
from rcm_jax.sampling.schedules import RolloutSchedule, few_step_schedule
from rcm_jax.wan.dit import DiT

CONSISTENCY = ("scm", "rf_scm", "dcm")
TimeRange = tuple[float, float]
WHOLE: TimeRange = (0.0, 1.0)
LEAST_SHARE = 0.01  # of a sampler's times that must lie in a range


@dataclasses.dataclass(frozen=True)
class TimeSamplerConfig:
    """`lognormal` reads mean and std, `uniform_shift` reads shift."""

    name: str = "lognormal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 5.0

    def __post_init__(self):
        check_settings(self, "time sampler: ", mean=FINITE, std=POSITIVE, shift=POSITIVE)

    def build(self, t_range: TimeRange = WHOLE) -> TimeSampler:
        """Of RF times, those in the range alone."""
        if self.name == "lognormal":
            sampler = LogNormal(self.mean, self.std)
        elif self.name == "uniform_shift":
            sampler = UniformShift(self.shift)
        else:
            raise ValueError(f"time sampler {self.name!r} is unknown; use 'lognormal' or 'uniform_shift'")
        return sampler if t_range == WHOLE else Truncated(sampler, *t_range)

    def share(self, t_range: TimeRange) -> float:
        """Which part of its times lies in a range."""
        if self.name == "uniform_shift":
            low, high = (unshift_time(t, self.shift) for t in t_range)
        else:
            sigmas = (math.inf if t == 1 else t / (1 - t) for t in t_range)
            logs = (math.log(sigma) if sigma else -math.inf for sigma in sigmas)
            low, high = (math.erf((x - self.mean) / (self.std * math.sqrt(2))) / 2 for x in logs)
        return high - low


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """Which losses train the student, and their settings (rCM, arXiv 2510.08431).

    name "diffusion" trains a teacher by flow matching; "distill" a student from `teacher`. `consistency` is one of
    scm, rf_scm, dcm or "" for none; `dmd_scale` 0 means no distribution matching and no fake score. `p_G` draws the
    times of the consistency or the diffusion loss, `p_D` those of the scores. `guidance` is w in uncond + w (cond -
    uncond); where others write cond + w (cond - uncond), theirs is one less. `fused_tangent` takes attention's value
    and tangent in the consistency loss from one kernel instead of two. `t_range` are the RF times that the network is
    for, of Wan2.2's experts one side of their boundary: all times are drawn from it, and the student's own video makes
    the sampler's steps on that side.
    """

    name: str = "distill"
    consistency: str = "scm"
    consistency_scale: float = 100.0
    dmd_scale: float = 1.0
    guidance: float = 5.0
    p_G: TimeSamplerConfig = TimeSamplerConfig("lognormal", 0.7, 1.6)
    p_D: TimeSamplerConfig = TimeSamplerConfig("uniform_shift", shift=5.0)
    tangent_warmup: int = 1000
    student_update_freq: int = 5
    max_simulation_steps: int = 4
    dmd_fixed_times: bool = False
    dcm_total_steps: int = 48
    dcm_skip: int = 1
    dcm_shift: float = 5.0
    fused_tangent: bool = False
    t_range: TimeRange = WHOLE

    def __post_init__(self):
        object.__setattr__(self, "t_range", tuple(map(float, self.t_range)))
        count = at_least(0)
        check_settings(
            self, "method.", consistency_scale=count, dmd_scale=count, guidance=count, tangent_warmup=count,
            student_update_freq=at_least(1), max_simulation_steps=between(1, 4), dcm_total_steps=at_least(1),
            dcm_skip=at_least(1), dcm_shift=POSITIVE,
        )  # fmt: skip
        if self.name not in ("diffusion", "distill"):
            raise ValueError(f"method.name={self.name!r} is unknown; use 'diffusion' or 'distill'")
        if self.consistency not in (*CONSISTENCY, ""):
            raise ValueError(f"method.consistency={self.consistency!r} is unknown; use one of {CONSISTENCY} or ''")
        if self.name == "distill" and not self.uses_consistency and not self.uses_dmd:
            raise ValueError("nothing to train: consistency is '' or its scale 0, and dmd_scale is 0")
        if self.uses_dmd and not self.uses_consistency and self.tangent_warmup:
            raise ValueError(
                f"tangent_warmup={self.tangent_warmup} without a consistency loss would train nothing; set it to 0"
            )
        self._check_range()

    def _check_range(self):
        if len(self.t_range) != 2 or not 0 <= self.t_range[0] < self.t_range[1] <= 1:
            raise ValueError(
                f"method.t_range={self.t_range} must be two RF times, the lower first, as (0.9, 1.0) or (0.0, 0.9)"
            )
        if self.t_range == WHOLE:
            return
        for name in ("p_G", "p_D"):
            own = self.uses_consistency and self.consistency != "dcm"
            used = self.uses_dmd if name == "p_D" else self.name == "diffusion" or own
            if used and (share := getattr(self, name).share(self.t_range)) < LEAST_SHARE:
                raise ValueError(f"method.t_range={self.t_range} has {share:.1%} of the times of method.{name}")
        if self.uses_consistency and self.consistency == "dcm" and self.dcm_range[0] > self.dcm_range[1]:
            raise ValueError(
                f"method.t_range={self.t_range} has no room for method.dcm_skip={self.dcm_skip} of "
                f"{self.dcm_total_steps} steps"
            )
        steps = len(sampler_times(self.t_range))
        if self.uses_dmd and self.dmd_fixed_times and self.max_simulation_steps > steps:
            raise ValueError(
                f"method.max_simulation_steps={self.max_simulation_steps}: the sampler has {steps} of its steps in "
                f"method.t_range={self.t_range}"
            )

    @property
    def dcm_range(self) -> TimeRange:
        """`Draws.u` of the first and the last dCM step that lie in the range."""
        if self.t_range == WHOLE:
            return WHOLE
        low, high = (unshift_time(t, self.dcm_shift) for t in self.t_range)
        room = max(1 - self.dcm_skip / self.dcm_total_steps, 1e-6)
        return (1 - high) / room, 1 - low / room

    @property
    def uses_consistency(self) -> bool:
        return self.name == "distill" and bool(self.consistency) and self.consistency_scale > 0

    @property
    def uses_dmd(self) -> bool:
        return self.name == "distill" and self.dmd_scale > 0


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """What a teacher that starts from random weights needs, under method "diffusion"; published teachers come trained.

    text_dropout: the part of samples that lose their text: guidance needs an unconditional network.
    frame_times: the part of samples whose latent frames have times of their own, rising from the first to the last:
        the later frames must be foretold from the earlier ones, which takes the direction of motion. Under one noise
        level a frame is best told from its neighbours on both sides: the network stays blind to which way time runs.
    """

    text_dropout: float = 0.0
    frame_times: float = 0.0

    def __post_init__(self):
        part = between(0, 1)
        check_settings(self, "diffusion.", text_dropout=part, frame_times=part)


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """Training of a causal network (Causal-rCM, arXiv 2606.25473). An empty `pattern` trains a bidirectional one.

    Under a pattern such as "c1-4", method "diffusion" is teacher forcing (`forcing` "tf") or diffusion forcing ("df",
    times of the chunks by `df_times`); the consistency losses are teacher-forced, in rectified flow (rf_scm, dcm); and
    distribution matching is self forcing: `score_teacher` of the run is its bidirectional teacher, under
    `score_guidance`. `replay` recomputes the rollout's last steps chunk by chunk: less memory, the same gradient.

    steps_per_chunk, middle: the sampler that is distilled for, as in `few_step_schedule`; noisy_context_from: the chunk
    from which on context is seen at the chunk's last time, -1 for never. window and sink count chunks, window 0: all.
    """

    pattern: str = ""
    window: int = 0
    sink: int = 0
    forcing: str = "tf"
    df_times: str = "independent"
    weighting: str = "none"
    steps_per_chunk: tuple[int, ...] = (4,)
    middle: tuple[tuple[float, ...], ...] = ()
    noisy_context_from: int = -1
    score_guidance: float = 5.0
    replay: bool = True

    def __post_init__(self):
        object.__setattr__(self, "steps_per_chunk", tuple(self.steps_per_chunk))
        object.__setattr__(self, "middle", tuple(tuple(times) for times in self.middle))
        check_settings(self, "causal.", window=at_least(0), sink=at_least(0), score_guidance=at_least(0))
        if self.forcing not in ("tf", "df"):
            raise ValueError(f"causal.forcing={self.forcing!r} is unknown; use 'tf' or 'df'")
        if self.df_times not in DF_TIMES:
            raise ValueError(f"causal.df_times={self.df_times!r} must be one of {DF_TIMES}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"causal.weighting={self.weighting!r} must be one of {WEIGHTINGS}")
        self.schedule(1600.0)  # its errors

    def schedule(self, sigma_max: float) -> RolloutSchedule:
        """How the student is sampled, from noise of sigma_max; math.inf starts at t = 1, as training does."""
        return few_step_schedule(
            self.steps_per_chunk, middle_by_entry=self.middle or None, sigma_max=sigma_max,
            noisy_context_from=None if self.noisy_context_from < 0 else self.noisy_context_from,
        )  # fmt: skip

    def spans(self, frames: int) -> Spans:
        """Where the chunks of a video of so many latent frames begin and end."""
        return ChunkPattern.parse(self.pattern).spans(frames)

    def network(self, dit: DiT, latent_shape: tuple[int, int, int]) -> CausalDiT:
        """The causal network for videos of that size."""
        pattern, window = ChunkPattern.parse(self.pattern), self.window or None
        return CausalDiT(dit, pattern, latent_shape[0], latent_shape[1:], window, self.sink)
