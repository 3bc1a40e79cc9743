"""What a training run is told, as frozen dataclasses. Recipes in configs/ fill them in."""

import dataclasses

from rcm_jax.chunks import ChunkPattern
from rcm_jax.data.config import DataConfig
from rcm_jax.objectives.config import CausalConfig, DiffusionConfig, MethodConfig, TimeSamplerConfig
from rcm_jax.ranges import POSITIVE, Range, at_least, between, check_settings
from rcm_jax.wan.config import DiTConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with float32 masters. `b1` 0 keeps no first moment. `decay_updates` > 0 adds a cosine fall to zero.

    `frozen` names top-level parameters of the student that stay the teacher's. `spike` > 0 leaves out an update whose
    gradient is so many times as large as usual.
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
    spike: float = 0.0
    frozen: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "frozen", tuple(self.frozen))
        part, count = Range(0, 0.99999), at_least(0)
        check_settings(
            self, "optimizer.", lr=POSITIVE, lr_fake=POSITIVE, b1=part, b2=part, eps=POSITIVE, weight_decay=count,
            warmup_updates=count, decay_updates=count, clip_norm=count, spike=count,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis: batch (data), batch and parameters (fsdp), tokens of a video (sequence).

    data=-1 takes what is left.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1

    def __post_init__(self):
        check_settings(self, "mesh.", fsdp=at_least(1), sequence=at_least(1))
        if self.data != -1:
            check_settings(self, "mesh.", data=at_least(1))


@dataclasses.dataclass(frozen=True)
class PreviewConfig:
    """Videos of the averaged weights, made every `sample_every` steps.

    prompts: without any, examples of the world's. num_steps: 0 is as the weights' file would be sampled. vae,
    text_encoder, tokenizer: files around a network of Wan's; what is not named is looked for beside its start.
    """

    prompts: tuple[str, ...] = ()
    num_steps: int = 0
    vae: str = ""
    text_encoder: str = ""
    tokenizer: str = ""

    def __post_init__(self):
        prompts = (self.prompts,) if isinstance(self.prompts, str) else tuple(self.prompts)
        object.__setattr__(self, "prompts", prompts)
        check_settings(self, "previews.", num_steps=at_least(0))


DTYPES = ("", "bfloat16", "float32")
SHARED_SIZES = ("in_channels", "out_channels", "patch_size", "text_dim", "text_len", "image_dim")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on. Equal configs and seeds give equal numbers.

    teacher: weights of the teacher, which student and fake score start from. Causal training may start the student
    from others, `init`; and self forcing takes its scores, and starts the fake score, from `score_teacher`.
    teacher_model, score_model: their sizes, where they are not the student's; the fake score is as large as the network
    that it is compared with.
    teacher_dtype: of the weights of networks that stand still, read from files; "" is what each computes in.
    microbatches: into how many cuts of the batch a step is divided, one after another, to save memory.
    keep, keep_every: the newest so many checkpoints stay, and those of every so many steps besides (0: none).
    stop_after: a run ends that left out so many updates in a row, for losses or gradients that are not finite, for
    batches without a sample that is, or for spikes (0: never).
    weights_every: after how many steps the average is also left as a model file, weights/STEP/; 0 is at the end alone.
    """

    model: DiTConfig
    method: MethodConfig = dataclasses.field(default_factory=MethodConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    causal: CausalConfig = dataclasses.field(default_factory=CausalConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    teacher: str = ""
    teacher_model: DiTConfig | None = None
    init: str = ""
    score_teacher: str = ""
    score_model: DiTConfig | None = None
    teacher_dtype: str = ""
    seed: int = 0
    steps: int = 1000
    microbatches: int = 1
    ema_rate: float = 0.1
    sigma_max: float = 80.0
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 3
    keep_every: int = 0
    sample_every: int = 0
    previews: PreviewConfig = dataclasses.field(default_factory=PreviewConfig)
    weights_every: int = 0
    tensorboard: bool = True
    wandb: str = ""
    stop_after: int = 20

    # May differ between a run and its resumption: they change what is written, or where a step is computed (the last
    # digits with it), not what. A set of shards may move; that it is the same one, its fingerprint tells.
    CADENCE = (
        "steps", "log_every", "checkpoint_every", "keep", "keep_every", "sample_every", "weights_every", "tensorboard",
        "wandb", "stop_after", "mesh.data", "mesh.fsdp", "mesh.sequence", "model.remat", "data.path", "data.threads",
        "data.max_bad",
        *(f"previews.{field.name}" for field in dataclasses.fields(PreviewConfig)),
    )  # fmt: skip

    def __post_init__(self):
        once = at_least(1)
        check_settings(
            self, seed=between(0, 2**32 - 1), steps=once, microbatches=once, ema_rate=POSITIVE, sigma_max=POSITIVE,
            log_every=once, checkpoint_every=once, keep=once, keep_every=at_least(0), sample_every=at_least(0),
            weights_every=at_least(0), stop_after=at_least(0),
        )  # fmt: skip
        if self.teacher_dtype not in DTYPES:
            raise ValueError(f"teacher_dtype={self.teacher_dtype!r} must be one of {', '.join(map(repr, DTYPES))}")
        if self.data.batch_size % self.microbatches:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} must be divisible by microbatches={self.microbatches}"
            )
        self._check_sizes()
        if self.method.name == "distill" and not self.teacher:
            raise ValueError("teacher is empty: give the path of the teacher's weights, or 'toy' for the built-in one")
        if self.causal.pattern:
            self._check_causal()

    def _check_sizes(self):
        for name, file in (("teacher_model", self.teacher), ("score_model", self.score_teacher)):
            other = getattr(self, name)
            if other is not None and not file:
                raise ValueError(f"{name} is the size of weights that the config does not name")
            if name == "teacher_model" and other not in (None, self.model) and not self.init:
                raise ValueError(
                    "init is empty: a student of another size than its teacher starts from weights of its own"
                )
            for field in SHARED_SIZES if other is not None else ():
                own, theirs = getattr(self.model, field), getattr(other, field)
                if own != theirs:
                    raise ValueError(f"{name}.{field}={theirs} must be the student's, {own}: they read the same batch")

    @property
    def models(self) -> tuple[DiTConfig, DiTConfig, DiTConfig]:
        """Of the student, the teacher and the scores."""
        teacher = self.teacher_model or self.model
        return self.model, teacher, self.score_model or (self.model if self.score_teacher else teacher)

    def _check_causal(self):
        method, frames = self.method, self.data.latent_shape[0]
        chunks = len(ChunkPattern.parse(self.causal.pattern).spans(frames))
        if self.diffusion.frame_times:
            raise ValueError(
                f"diffusion.frame_times={self.diffusion.frame_times} is for bidirectional teachers; under "
                f"causal.pattern={self.causal.pattern!r} use causal.forcing 'df' for times of their own"
            )
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
            "teacher_model": DiTConfig,
            "score_model": DiTConfig,
            "diffusion": DiffusionConfig,
            "causal": CausalConfig,
            "optimizer": OptimizerConfig,
            "data": DataConfig,
            "mesh": MeshConfig,
            "previews": PreviewConfig,
        }
        built = {key: part(**values[key]) for key, part in parts.items() if values.get(key) is not None}
        return cls(**(values | built | {"method": MethodConfig(**method)}))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
