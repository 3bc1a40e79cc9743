"""What a step tells its objective, and what it does with the answer: on an objective of one parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.data.batch import Batch
from rcm_jax.objectives.networks import Networks
from rcm_jax.training import step as step_module
from rcm_jax.training.ema import power_ema_beta, power_ema_exponent
from rcm_jax.training.schedule import step_name
from rcm_jax.training.state import init_state
from rcm_jax.training.step import make_steps
from tests.tiny import tiny_run

NULL = np.zeros((8, 64), np.float32)
LATENTS = jax.random.normal(jax.random.key(0), (8, 9, 6, 6, 12)) + 0.3
BATCH = Batch(LATENTS, jnp.zeros((8, 8, 64)))


class Told:
    """Its loss is w times a sample's mean; it logs what it was told."""

    def answer(self, params, batch, draws, told):
        values = params["w"] * batch.latents.mean((1, 2, 3, 4))
        masked = jnp.isnan(values)
        told = {
            name: {"loss": jnp.full(values.shape, v), "masked": jnp.zeros_like(masked)}
            for name, v in told.items()
            if v is not None
        }
        told["own"] = {"loss": values, "masked": masked}
        return values, told

    def student_losses(self, networks, batch, draws, *, warmup, num_steps):
        told = {"warmup": warmup, "num_steps": num_steps} | self.names(networks)
        return [lambda params: self.answer(params, batch, draws, told)]

    def critic(self, params, networks, batch, draws, *, num_steps):
        return self.answer(params, batch, draws, {"num_steps": num_steps} | self.names(networks))

    def diffusion(self, params, batch, draws):
        return self.answer(params, batch, draws, {})

    def names(self, networks):
        given = {"teacher": networks.teacher, "fake": networks.fake_score, "student": networks.student}
        return {name: None if p is None else p["w"] for name, p in given.items()}


@pytest.fixture(autouse=True)
def told(monkeypatch):
    monkeypatch.setattr(step_module, "make_objective", lambda *_: Told())


def state_of(config, step):
    state = init_state(config, {"w": jnp.float32(2.0)}, {"w": jnp.float32(3.0)})
    return state.replace(step=jnp.int32(step), ema={"w": jnp.float32(5.0)})


def take(config, step, batch=BATCH):
    """One step from student 2, fake score 3, average 5 and teacher 7."""
    run = make_steps(config, NULL)[step_name(config.method, step)]
    return run(state_of(config, step), Networks(teacher={"w": jnp.float32(7.0)}), batch)


STUDENT = {"loss_teacher": 7, "loss_fake": 3}  # and no student among the networks that stand still
CRITIC = {"loss_teacher": 7, "loss_student": 2}


@pytest.mark.parametrize(
    ("step", "want"),
    [
        (0, STUDENT | {"loss_warmup": 0}),
        (1, STUDENT | {"loss_warmup": 0.5}),
        (2, STUDENT | {"loss_warmup": 1, "loss_num_steps": 3}),  # two updates of the student before it
        (3, CRITIC | {"loss_num_steps": 1}),
        (4, CRITIC | {"loss_num_steps": 2}),
        (5, STUDENT | {"loss_warmup": 1, "loss_num_steps": 4}),
        (6, CRITIC | {"loss_num_steps": 3}),
        (8, STUDENT | {"loss_warmup": 1, "loss_num_steps": 1}),
    ],
)
def test_what_the_objective_is_told(step, want):
    """Two steps of warm-up, then the student at every third."""
    _, metrics = take(tiny_run(), step)
    got = {k: float(v) for k, v in metrics.items() if k.startswith("loss_") and k != "loss_own"}
    assert got == pytest.approx(want)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_gradient_is_the_mean_over_the_batch(microbatches):
    _, metrics = take(tiny_run(microbatches=microbatches), 0)
    np.testing.assert_allclose(metrics["grad_norm"], jnp.abs(LATENTS.mean()), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_own"], 2 * LATENTS.mean(), rtol=1e-5)


@pytest.mark.parametrize(("step", "updates"), [(1, 1), (5, 3), (8, 4)])
def test_the_average_counts_updates_of_the_student(step, updates):
    after, _ = take(tiny_run(optimizer={"warmup_updates": 0}), step)
    beta = power_ema_beta(updates, power_ema_exponent(0.1))
    np.testing.assert_allclose(after.ema["w"], beta * 5 + (1 - beta) * after.student["w"], rtol=1e-5)
    assert after.student["w"] != 2


def test_the_critic_leaves_the_average_alone():
    after, _ = take(tiny_run(optimizer={"warmup_updates": 0}), 3)
    assert (after.ema["w"], after.student["w"], after.step) == (5, 2, 4)
    assert after.fake_score["w"] != 3


@pytest.mark.parametrize("step", [1, 3])
def test_a_gradient_that_is_not_finite_leaves_the_update_out(step):
    config = tiny_run(microbatches=2)
    before = state_of(config, step)
    batch = Batch(LATENTS.at[3, 0, 0, 0, 0].set(jnp.nan), BATCH.text)
    after, metrics = take(config, step, batch)
    assert (metrics["skipped_updates"], metrics["masked"]) == (1, 1)
    for name in ("student", "student_opt", "fake_score", "fake_opt"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert after.step == step + 1


def test_every_step_draws_anew():
    """From (seed, step) alone, and for every microbatch its own."""

    class Noise(Told):
        def answer(self, params, batch, draws, told):
            return super().answer(params, batch, draws, {"noise": draws.noise.mean()})

    def noise(config, step):
        step_module.make_objective = lambda *_: Noise()
        return float(take(config, step)[1]["loss_noise"])

    config = tiny_run()
    first, again, later = noise(config, 0), noise(config, 0), noise(config, 1)
    seed = noise(tiny_run(seed=1), 0)
    assert first == again
    assert len({first, later, seed}) == 3
