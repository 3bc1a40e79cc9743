"""The step as a whole: what it trains, on one device and on a mesh, with good batches and bad ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rcm_jax.objectives.config import MethodConfig
from rcm_jax.objectives.networks import Networks
from rcm_jax.parallel import batch_sharding, in_cuts, make_mesh
from rcm_jax.training.config import RunConfig
from rcm_jax.training.loop import train
from rcm_jax.training.state import Weights, init_state
from rcm_jax.training.step import make_steps, mean_gradient, one_after_the_other
from tests.tiny import MODEL, RandomSource, perturbed_params, tiny_run


@pytest.fixture(scope="module")
def teacher():
    return perturbed_params(MODEL, 7)


def moved(before, after) -> bool:
    return any(bool((a != b).any()) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def one_step(config: RunConfig, name: str, teacher, batch=None):
    source = RandomSource(config)
    batch = source.batch(0) if batch is None else batch
    before = init_state(config, teacher)
    kept = jax.tree.map(jnp.copy, before)
    after, metrics = make_steps(config, source.null_text)[name](before, Networks(teacher=teacher), batch)
    return kept, after, metrics


def test_student_and_critic_steps_move_their_own_network(teacher):
    config = tiny_run(method={"tangent_warmup": 0})
    before, after, metrics = one_step(config, "student_dmd", teacher)
    assert moved(before.student, after.student)
    assert moved(before.ema, after.ema)
    assert not moved(before.fake_score, after.fake_score)
    assert metrics["loss_consistency"] > 0
    assert metrics["loss_dmd"] >= 0
    before, after, metrics = one_step(config, "critic", teacher)
    assert not moved(before.student, after.student)
    assert moved(before.fake_score, after.fake_score)
    assert metrics["loss_critic"] > 0


@pytest.mark.long
def test_the_first_average_is_the_student(teacher):
    _, after, _ = one_step(tiny_run(), "student", teacher)
    jax.tree.map(np.testing.assert_array_equal, after.ema, after.student)


@pytest.mark.long
def test_the_fused_tangent_trains_the_same(teacher):
    states = []
    for fused in (False, True):
        config = tiny_run(method={"fused_tangent": fused, "tangent_warmup": 0})
        states.append(one_step(config, "student", teacher)[1].student)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *states)


@pytest.mark.parametrize("consistency", ["scm", "rf_scm", "dcm"])
def test_consistency_losses_train(teacher, consistency):
    config = tiny_run(method={"consistency": consistency, "dmd_scale": 0.0, "tangent_warmup": 0})
    before, after, metrics = one_step(config, "student", teacher)
    assert after.fake_score is None
    assert moved(before.student, after.student)
    assert all(jnp.isfinite(v).all() for v in metrics.values())


@pytest.mark.parametrize(
    "image_dim", [pytest.param(None, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.long)]
)
def test_image_to_video_networks_train(image_dim):
    """Mask and image behind the noise, CLIP's tokens where the network takes them: through every loss of both steps."""
    model = dataclasses.replace(MODEL, in_channels=MODEL.out_channels + 4, image_dim=image_dim, num_layers=1)
    config = tiny_run(method={"tangent_warmup": 0}, model=model)
    data = dataclasses.replace(config.data, latent_shape=(3, 4, 4), batch_size=2)
    config, teacher = dataclasses.replace(config, data=data), perturbed_params(model, 7)
    before, after, metrics = one_step(config, "student_dmd", teacher)
    assert all(moved(before.student[name], after.student[name]) for name in before.student)
    cross = [state.student["blocks"]["cross_attn"] for state in (before, after)]
    assert ("v_img" in cross[0]) == (image_dim is not None)
    assert image_dim is None or moved(cross[0]["v_img"], cross[1]["v_img"])
    assert metrics["loss_consistency"] > 0
    assert metrics["loss_dmd"] > 0
    before, after, _ = one_step(config, "critic", teacher)
    assert all(moved(before.fake_score[name], after.fake_score[name]) for name in before.fake_score)


def test_a_bad_sample_is_counted_and_the_update_goes_on(teacher):
    config = tiny_run(method={"dmd_scale": 0.0})
    batch = RandomSource(config).batch(0)
    batch.latents[3, 0, 0, 0, 0] = np.nan
    before, after, metrics = one_step(config, "student", teacher, batch)
    # NaN inside the network reaches its weights' gradient whatever the loss does: then the whole update is left out
    assert metrics["masked"] == 1
    assert metrics["skipped_updates"] == 1
    assert not moved(before.student, after.student)
    assert after.step == 1


def test_gradients_one_after_the_other_are_the_gradient_of_the_sum():
    params = {"w": jnp.arange(1.0, 4.0)}
    x = jax.random.normal(jax.random.key(0), (8, 3))
    losses = [
        lambda p: (jnp.square(x @ p["w"]), {"square": x.sum()}),
        lambda p: (jnp.sin(x @ p["w"]), {"sine": x.max()}),
    ]
    grads, parts = jax.jit(functools.partial(one_after_the_other, losses))(params)
    want = jax.grad(lambda p: sum(loss(p)[0].mean() for loss in losses))(params)
    np.testing.assert_allclose(grads["w"], want["w"], rtol=1e-6)
    assert parts.keys() == {"square", "sine"}
    alone, _ = one_after_the_other(losses[:1], params)
    np.testing.assert_allclose(alone["w"], jax.grad(lambda p: losses[0](p)[0].mean())(params)["w"], rtol=1e-6)


def test_cuts_take_from_every_device_what_it_has():
    """Sample i is in cut i % parts; on a mesh every cut lies over all devices, and nothing is sent."""
    x = jnp.arange(16.0).reshape(16, 1)
    np.testing.assert_array_equal(in_cuts(x, 2)[1, :, 0], np.arange(1, 16, 2))
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        cut = jax.jit(functools.partial(in_cuts, parts=2)).lower(jax.device_put(x, batch_sharding(mesh))).compile()
    assert "all-" not in cut.as_text()
    assert cut.output_shardings.spec in (P(None, "fsdp"), P(None, ("data", "fsdp")))  # data is 1


def test_accumulation_is_the_mean_over_the_cuts():
    params = {"w": jnp.arange(3.0)}
    batch = {"x": jax.random.normal(jax.random.key(0), (8, 3))}

    def loss(params, batch, key):
        drawn = jax.random.uniform(key)
        return jnp.square(batch["x"] @ params["w"]).mean(), {
            "masked": jnp.ones((), jnp.int32), "loss": batch["x"].mean(), "drawn": drawn, "square": drawn**2,
        }  # fmt: skip

    whole, _ = mean_gradient(jax.grad(loss, has_aux=True), params, batch, jax.random.key(1), 1)
    cuts, metrics = mean_gradient(jax.grad(loss, has_aux=True), params, batch, jax.random.key(1), 4)
    np.testing.assert_allclose(cuts["w"], whole["w"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], batch["x"].mean(), rtol=1e-5)
    assert metrics["masked"] == 4
    assert metrics["square"] - metrics["drawn"] ** 2 > 1e-3  # every cut draws its own


@pytest.fixture(scope="module")
def alone(teacher):
    """Seven steps of the alternation, critic included, on one device."""
    return train(
        tiny_run(), RandomSource(tiny_run()), weights=Weights(teacher=teacher), devices=jax.devices()[:1], progress=""
    )


@pytest.mark.slow  # test_mesh has the steps one by one
@pytest.mark.parametrize(
    "mesh",
    [
        {"fsdp": 2, "data": 2, "sequence": 2},
        {"fsdp": 4, "data": 2},
        {"fsdp": 8},
    ],  # of 81 tokens, one device gets padding
    ids=str,
)
def test_a_mesh_gives_the_numbers_of_one_device(teacher, alone, mesh):
    """The same seven steps over eight devices, parameters sharded."""
    config = tiny_run(mesh=mesh)
    many = train(config, RandomSource(config), weights=Weights(teacher=teacher), progress="")
    kernel = many.student["blocks"]["self_attn"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // (mesh["fsdp"] * mesh.get("sequence", 1))
    for name in ("student", "ema", "fake_score", "student_opt", "fake_opt"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
            getattr(alone, name),
            getattr(many, name),
        )


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="consistency='cm' is unknown"):
        MethodConfig(consistency="cm")
    with pytest.raises(ValueError, match="nothing to train"):
        MethodConfig(consistency="", dmd_scale=0.0)
    with pytest.raises(ValueError, match="tangent_warmup=1000 without a consistency loss"):
        MethodConfig(consistency="")
    with pytest.raises(ValueError, match=r"batch_size=8 must be divisible by microbatches=3"):
        tiny_run(microbatches=3)
    with pytest.raises(ValueError, match="teacher is empty"):
        tiny_run(teacher="")
    with pytest.raises(ValueError, match=r"mesh.fsdp=3 does not divide the 8 devices; use one of \[1, 2, 4, 8\]"):
        train(tiny_run(mesh={"fsdp": 3}), RandomSource(tiny_run()), progress="")
    config = tiny_run()
    assert RunConfig.from_dict(config.to_dict()) == config
