"""Image to video: the losses on a batch with a condition are those of networks that close over it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.data.batch import Batch
from rcm_jax.objectives.binding import Bidirectional, Role, Sizes
from rcm_jax.objectives.config import CausalConfig, MethodConfig
from rcm_jax.objectives.draws import Draws
from rcm_jax.objectives.networks import Networks
from rcm_jax.objectives.objective import Objective, make_objective
from rcm_jax.wan.dit import DiT
from tests.tiny import IMAGE_TOKENS, MODEL, perturbed_params

I2V = dataclasses.replace(MODEL, num_layers=1, remat="none", in_channels=MODEL.out_channels + 4, image_dim=6)
SHAPE = (2, 2, 4, 4, MODEL.out_channels)
METHOD = MethodConfig(tangent_warmup=0, guidance=3.0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


CONDITION, IMAGE = normal(1, *SHAPE[:-1], 4), normal(2, 2, IMAGE_TOKENS, 6)
TEXT, NULL = normal(3, 2, MODEL.text_len, MODEL.text_dim), normal(4, MODEL.text_len, MODEL.text_dim)
BATCH = Batch(normal(0, *SHAPE), TEXT, CONDITION, IMAGE)
T = jnp.array([0.3, 0.8])
DRAWS = Draws(
    noise=normal(5, *SHAPE), t=T, simulation_noises=normal(6, 2, *SHAPE), simulation_t=T[None],
    score_noise=normal(7, *SHAPE), score_t=T[::-1],
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Closed(Bidirectional):
    """Knows this file's pictures by heart and takes none from the batch; both passes of a teacher see them."""

    def bind(self, params, batch, role, draws):
        def asked(text):
            def v(x, t):
                pictures = jnp.concatenate([x, CONDITION], axis=-1)
                return DiT(I2V).apply({"params": params}, pictures, 1000 * t, text, IMAGE)

            return v

        if role not in (Role.TEACHER, Role.SCORE_TEACHER):
            return asked(batch.text)
        null = jnp.stack([NULL, NULL])
        return lambda x, t: asked(null)(x, t) + 3.0 * (asked(batch.text)(x, t) - asked(null)(x, t))


OWN = make_objective(METHOD, CausalConfig(), DiT(I2V), NULL)
BY_HEART = Objective(Closed(Sizes.all(DiT(I2V)), NULL, 3.0), METHOD)


def losses(objective, params, networks, batch):
    """Every loss a sample, and the gradient of the student's."""

    def student(params):
        loss, parts = objective.student(params, networks, batch, DRAWS, warmup=1.0, num_steps=2)
        return loss.sum(), parts

    grads, parts = jax.grad(student, has_aux=True)(params)
    critic, _ = objective.critic(params, networks, batch, DRAWS, num_steps=2)
    diffusion, _ = objective.diffusion(params, batch, DRAWS)
    each = {name: part["loss"] for name, part in parts.items()}
    return each | {"critic": critic, "diffusion": diffusion}, grads


of_own, of_by_heart = (jax.jit(functools.partial(losses, objective)) for objective in (OWN, BY_HEART))


@pytest.fixture(scope="module")
def weights():
    student, teacher, fake = (perturbed_params(I2V, seed) for seed in (0, 7, 2))
    return student, Networks(teacher=teacher, student=student, fake_score=fake)


@pytest.fixture(scope="module")
def own(weights):
    return of_own(*weights, BATCH)


@pytest.mark.long
def test_losses_are_those_of_networks_that_close_over_the_picture(weights, own):
    want, want_grads = of_by_heart(*weights, Batch(BATCH.latents, TEXT))
    got, grads = own
    assert set(got) == {"consistency", "dmd", "critic", "diffusion"}
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, want_grads)


@pytest.mark.parametrize("name", [pytest.param("condition", marks=pytest.mark.long), "image"])
def test_each_sample_sees_its_own_picture(weights, own, name):
    """Another picture of the second sample changes all of its losses, and none of the first's."""
    other = dataclasses.replace(BATCH, **{name: getattr(BATCH, name).at[1].multiply(-2.0)})
    for key, loss in of_own(*weights, other)[0].items():
        np.testing.assert_allclose(loss[0], own[0][key][0], rtol=1e-5, err_msg=key)
        assert abs(loss[1] / own[0][key][1] - 1) > 1e-4, key


def test_a_batch_without_its_picture_is_refused(weights):
    for name, words in {"condition": "16, 4 of them the condition", "image": r"image tokens \[B, tokens, 6\]"}.items():
        batch = dataclasses.replace(BATCH, **{name: None})
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(lambda batch: OWN.diffusion(weights[0], batch, DRAWS), batch)
