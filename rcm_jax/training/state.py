"""The training state: one pytree that holds all a resumed run needs besides its config; and what it starts from."""

import functools
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from rcm_jax.objectives.networks import Networks
from rcm_jax.parallel import shard, state_shardings
from rcm_jax.training.config import RunConfig
from rcm_jax.training.lora import init_lora
from rcm_jax.training.optimizer import adamw
from rcm_jax.types import Params
from rcm_jax.wan.networks import init_params


class Start(Protocol):
    """What a run starts from: networks in memory (`Weights`) or in files (`runs.WeightFiles`)."""

    def networks(self, config: RunConfig, mesh: Mesh) -> Networks:
        """Those that stand still and that a loss of the run reads, sharded over the mesh."""
        ...

    def start(self, config: RunConfig, mesh: Mesh) -> tuple[Params | None, Params | None]:
        """What student and fake score start from, float32, sharded, in buffers of their own. None: the student from
        random weights, the fake score as the student, or where it has another size from random weights too. Under LoRA
        it is not asked: they start from networks that stand still."""
        ...


def standing(config: RunConfig, *, init: bool, score_teacher: bool) -> tuple[str, ...]:
    """Names in `Networks` of those that a loss reads, and of those that a LoRA is added to. init, score_teacher:
    whether the run has them."""
    scoring = "score_teacher" if score_teacher else "teacher"
    names = ["teacher"] * config.method.uses_consistency + [scoring] * config.method.uses_dmd
    if config.lora.rank:
        names += filter(None, starts(config, init=init, score_teacher=score_teacher))
    return tuple(dict.fromkeys(names))


def starts(config: RunConfig, *, init: bool, score_teacher: bool) -> tuple[str, str | None]:
    """Which network student and fake score start from; None where the fake score has no other start than the
    student's. init, score_teacher: whether the run has them."""
    own, _, score = config.models
    fake = "score_teacher" if score_teacher else "teacher" if score != own else None
    return "init" if init else "teacher", fake if config.method.uses_dmd else None


def bases(config: RunConfig, networks: Networks) -> tuple[Params, Params]:
    """What the LoRA of the student and that of the fake score are added to: what they would start from without."""
    there = {name: getattr(networks, name) is not None for name in ("init", "score_teacher")}
    own, fake = starts(config, **there)
    return getattr(networks, own), getattr(networks, fake or own)


@flax.struct.dataclass
class Weights:
    """What a run starts from, in memory. The networks that stand still stay in the dtype that they have.

    teacher: of student and fake score, too, where nothing else is given; None starts from random weights, which only
        method "diffusion" can.
    init: the student starts from these instead. score_teacher: scores self forcing, and starts its fake score.
    """

    teacher: Params | None = None
    init: Params | None = None
    score_teacher: Params | None = None

    def networks(self, config: RunConfig, mesh: Mesh) -> Networks:
        names = standing(config, init=self.init is not None, score_teacher=self.score_teacher is not None)
        return shard(Networks(**{name: getattr(self, name) for name in names}), mesh)

    def start(self, config: RunConfig, mesh: Mesh) -> tuple[Params | None, Params | None]:
        names = starts(config, init=self.init is not None, score_teacher=self.score_teacher is not None)
        return tuple(None if name is None else _copied(getattr(self, name), mesh) for name in names)


def _copied(params: Params | None, mesh: Mesh) -> Params | None:
    """Float32, sharded, and in new buffers: the step gives its own away."""
    if params is None:
        return None
    copy = jax.jit(copied, out_shardings=state_shardings(mesh, params))
    return copy(shard(params, mesh))


def copied(params: Params) -> Params:
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)


SETTLED = 20  # updates before a norm can be called a spike
MEMORY = 0.98  # of the running mean


@flax.struct.dataclass
class NormRecord:
    """How large gradients usually are: the running mean of the norm's logarithm over the updates that counted."""

    count: Int[Array, ""]
    log_mean: Float[Array, ""]

    @classmethod
    def empty(cls) -> "NormRecord":
        return cls(jnp.zeros((), jnp.int32), jnp.zeros(()))

    def is_spike(self, norm: Float[Array, ""], factor: float) -> Bool[Array, ""]:
        """Whether a norm is more than `factor` times the usual one; 0 calls nothing a spike."""
        if not factor:
            return jnp.zeros((), bool)
        return (self.count >= SETTLED) & (jnp.log(norm) > self.log_mean + jnp.log(factor))

    def with_norm(self, norm: Float[Array, ""]) -> "NormRecord":
        keep = jnp.minimum(MEMORY, self.count / (self.count + 1))  # a plain mean at first
        log = jnp.log(jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        return NormRecord(self.count + 1, keep * self.log_mean + (1 - keep) * log)


@flax.struct.dataclass
class TrainState:
    """Noise, data order and the update schedule follow from (seed, step): the data position is the step.

    `fake_score` and `fake_opt` are None where no distribution loss is used.
    """

    step: Int[Array, ""]
    seed: Int[Array, ""]
    student: Params
    ema: Params
    student_opt: optax.OptState
    student_norms: NormRecord
    fake_score: Params | None = None
    fake_opt: optax.OptState | None = None
    fake_norms: NormRecord | None = None

    @property
    def key(self) -> Array:
        """The PRNG key of the coming step."""
        return jax.random.fold_in(jax.random.key(self.seed), self.step)


def init_state(config: RunConfig, start: Params | None, fake: Params | None = None) -> TrainState:
    """The state before step 0: the student and its average start as `start`, or from random weights; the fake score
    as `fake`; or as the student, where it has its size, else from random weights too. Under LoRA both are factors."""
    own, _, score = config.models
    o, key = config.optimizer, jax.random.key(config.seed)
    if config.lora.rank:
        student, fake = init_lora(config.lora, own, key), init_lora(config.lora, score, jax.random.fold_in(key, 1))
    else:
        student = copied(init_params(own, key) if start is None else start)
        if fake is None and score != own:
            fake = init_params(score, key)
        fake = copied(student if fake is None else fake)
    fake = fake if config.method.uses_dmd else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(config.seed, jnp.int32),
        student=student,
        ema=copied(student),
        student_opt=adamw(o, o.lr, config.frozen).init(student),
        student_norms=NormRecord.empty(),
        fake_score=fake,
        fake_opt=None if fake is None else adamw(o, o.lr_fake).init(fake),
        fake_norms=None if fake is None else NormRecord.empty(),
    )


def first_state(config: RunConfig, weights: Start, mesh: Mesh) -> TrainState:
    """`init_state` over the mesh. What it starts from becomes part of it: nothing is there twice."""
    student, fake = (None, None) if config.lora.rank else weights.start(config, mesh)
    make = jax.jit(
        functools.partial(init_state, config), out_shardings=state_shardings(mesh, abstract_state(config)),
        donate_argnums=(0, 1),
    )  # fmt: skip
    return make(student, fake)


def abstract_state(config: RunConfig) -> TrainState:
    """Shapes and dtypes of the state, nothing allocated."""
    return jax.eval_shape(lambda: init_state(config, None))
