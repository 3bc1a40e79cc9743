"""The training state: one pytree that holds all a resumed run needs besides its config."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from rcm_jax.training.config import RunConfig
from rcm_jax.training.optimizer import adamw
from rcm_jax.types import Params
from rcm_jax.wan.networks import init_params


@flax.struct.dataclass
class Weights:
    """What a run starts from, as its config names the files.

    teacher: of student and fake score, too, where nothing else is given; None starts from random weights, which only
        method "diffusion" can.
    init: the student starts from these instead. score_teacher: scores self forcing, and starts its fake score.
    """

    teacher: Params | None = None
    init: Params | None = None
    score_teacher: Params | None = None


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
    fake_score: Params | None = None
    fake_opt: optax.OptState | None = None

    @property
    def key(self) -> Array:
        """The PRNG key of the coming step."""
        return jax.random.fold_in(jax.random.key(self.seed), self.step)


def init_state(config: RunConfig, start: Params | None, fake: Params | None = None) -> TrainState:
    """The state before step 0: the student and its average start as `start`, or from random weights; the fake score
    as `fake`; or as the student, where it has its size, else from random weights too."""
    own, _, score = config.models
    student = init_params(own, jax.random.key(config.seed)) if start is None else start
    if fake is None and score != own:
        fake = init_params(score, jax.random.key(config.seed))

    def copy(params: Params) -> Params:  # buffers are donated, so no two may be the same
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)

    student = copy(student)
    fake = copy(student if fake is None else fake) if config.method.uses_dmd else None
    o = config.optimizer
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(config.seed, jnp.int32),
        student=student,
        ema=copy(student),
        student_opt=adamw(o, o.lr, o.frozen).init(student),
        fake_score=fake,
        fake_opt=None if fake is None else adamw(o, o.lr_fake).init(fake),
    )


def abstract_state(config: RunConfig) -> TrainState:
    """Shapes and dtypes of the state, nothing allocated."""
    return jax.eval_shape(lambda: init_state(config, None))
