"""What a training run is told, as frozen dataclasses. Recipes in configs/ fill them in."""

import dataclasses

from rcm_jax.chunks import ChunkPattern
from rcm_jax.flow import LogNormal, TimeSampler, UniformShift
from rcm_jax.losses.forcing import DF_TIMES, WEIGHTINGS
from rcm_jax.sampling.rollout import RolloutSchedule, few_step_schedule
from rcm_jax.wan.causal import CausalDiT
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.dit import DiT

CONSISTENCY = ("scm", "rf_scm", "dcm")


@dataclasses.dataclass(frozen=True)
class TimeSamplerConfig:
    """`lognormal` reads mean and std, `uniform_shift` reads shift."""

    name: str = "lognormal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 5.0

    def build(self) -> TimeSampler:
        if self.name == "lognormal":
            return LogNormal(self.mean, self.std)
        if self.name == "uniform_shift":
            return UniformShift(self.shift)
        raise ValueError(f"time sampler {self.name!r} is unknown; use 'lognormal' or 'uniform_shift'")


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """Which losses train the student, and their settings (SPEC: rCM, arXiv 2510.08431).

    name "diffusion" trains a teacher by flow matching; "distill" a student from `teacher`. `consistency` is one of
    scm, rf_scm, dcm or "" for none; `dmd_scale` 0 means no distribution matching and no fake score. For "diffusion":
    `text_dropout` is the part of samples without text, `frame_times` the part whose frames have rising times.
    `fused_tangent` takes attention's value and tangent in the consistency loss from one kernel instead of two.
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
    text_dropout: float = 0.1
    frame_times: float = 0.0
    fused_tangent: bool = False

    def __post_init__(self):
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
        if not 1 <= self.max_simulation_steps <= 4:
            raise ValueError(f"max_simulation_steps={self.max_simulation_steps} must be 1 to 4")
        if self.student_update_freq < 1:
            raise ValueError(f"student_update_freq={self.student_update_freq} must be at least 1")

    @property
    def uses_consistency(self) -> bool:
        return self.name == "distill" and bool(self.consistency) and self.consistency_scale > 0

    @property
    def uses_dmd(self) -> bool:
        return self.name == "distill" and self.dmd_scale > 0


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

    def network(self, dit: DiT, latent_shape: tuple[int, int, int]) -> CausalDiT:
        """The causal network for videos of that size."""
        pattern, window = ChunkPattern.parse(self.pattern), self.window or None
        return CausalDiT(dit, pattern, latent_shape[0], latent_shape[1:], window, self.sink)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with float32 masters. `b1` 0 keeps no first moment. `decay_updates` > 0 adds a cosine fall to zero.

    `frozen` names top-level parameters of the student that stay the teacher's.
    """

    lr: float = 2e-6
    lr_fake: float = 4e-7
    b1: float = 0.0
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_updates: int = 100
    decay_updates: int = 0
    clip_norm: float = 0.0
    frozen: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "frozen", tuple(self.frozen))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`toy` renders the built-in world; `shards` reads tar shards of latents and text embeddings from `path`.

    `latent_shape` is (T, H, W) in latent units; for `toy` it is the world's own and need not be given.
    """

    name: str = "toy"
    path: str = ""
    null_text: str = ""
    batch_size: int = 16
    latent_shape: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        object.__setattr__(self, "latent_shape", tuple(self.latent_shape))
        if self.name not in ("toy", "shards"):
            raise ValueError(f"data.name={self.name!r} is unknown; use 'toy' or 'shards'")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis: batch (data), batch and parameters (fsdp), tokens of a video (sequence).

    data=-1 takes what is left.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on. Equal configs and seeds give equal numbers.

    teacher: weights of the teacher, which student and fake score start from. Causal training may start the student
    from others, `init`; and self forcing takes its scores, and starts the fake score, from `score_teacher`.
    """

    model: DiTConfig
    method: MethodConfig = MethodConfig()
    causal: CausalConfig = CausalConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    teacher: str = ""
    init: str = ""
    score_teacher: str = ""
    seed: int = 0
    steps: int = 1000
    grad_accumulation: int = 1
    ema_rate: float = 0.1
    sigma_max: float = 80.0
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 3
    sample_every: int = 0
    tensorboard: bool = True
    wandb: str = ""

    # May differ between a run and its resumption: they change what is written, not what is computed.
    CADENCE = ("steps", "log_every", "checkpoint_every", "keep", "sample_every", "tensorboard", "wandb")

    def __post_init__(self):
        if self.data.batch_size % self.grad_accumulation:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} must be divisible by "
                f"grad_accumulation={self.grad_accumulation}"
            )
        if self.method.name == "distill" and not self.teacher:
            raise ValueError("teacher is empty: give the path of the teacher's weights, or 'toy' for the built-in one")
        if self.causal.pattern:
            self._check_causal()

    def _check_causal(self):
        method, frames = self.method, self.data.latent_shape[0]
        chunks = len(ChunkPattern.parse(self.causal.pattern).spans(frames))
        if method.uses_consistency and method.consistency == "scm":
            raise ValueError(
                "causal training is in rectified flow: use consistency 'rf_scm' or 'dcm' in place of 'scm'"
            )
        if method.uses_dmd and not self.score_teacher:
            raise ValueError("self forcing needs score_teacher: the weights of a bidirectional teacher")
        if method.uses_dmd and self.causal.window:
            raise ValueError(f"self forcing keeps the whole past: causal.window={self.causal.window} must be 0")
        if method.uses_dmd and method.max_simulation_steps != max(self.causal.steps_per_chunk):
            raise ValueError(
                f"method.max_simulation_steps={method.max_simulation_steps} must be the most of "
                f"causal.steps_per_chunk={self.causal.steps_per_chunk}"
            )
        self.causal.schedule(1600.0).check_chunks(chunks)

    @classmethod
    def from_dict(cls, values: dict) -> "RunConfig":
        """From nested plain dicts, as a recipe or config.json holds them. Unknown keys raise TypeError."""
        values = dict(values)
        method = dict(values.get("method", {}))
        for name in ("p_G", "p_D"):
            if name in method:
                method[name] = TimeSamplerConfig(**method[name])
        parts = {
            "model": DiTConfig,
            "causal": CausalConfig,
            "optimizer": OptimizerConfig,
            "data": DataConfig,
            "mesh": MeshConfig,
        }
        built = {key: part(**values[key]) for key, part in parts.items() if key in values}
        return cls(**(values | built | {"method": MethodConfig(**method)}))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
