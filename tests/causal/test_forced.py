"""Teacher forcing beside the context against the same as one packed sequence: values, tangents and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkPattern
from rcm_jax.losses.consistency import rf_scm_loss
from rcm_jax.objectives.binding import fused_under_jvp
from rcm_jax.parallel import make_mesh, shard, sharded_attention
from rcm_jax.wan.dit import DiT
from tests.causal.test_products import normal, packed
from tests.tiny import MODEL, perturbed_params

SIZE = (2, 6)  # 3 tokens a latent frame: lengths that two devices do not divide
T = jnp.array([0.3, 0.8])
TEXT = normal(5, 2, 5, MODEL.text_dim)


@pytest.fixture(scope="module")
def params():
    return perturbed_params(MODEL)


def network(pattern="c1-2", frames=5, window=None, sink=0, dit=None):
    return CausalDiT(dit or DiT(MODEL), ChunkPattern.parse(pattern), frames, SIZE, window, sink)


def beside(causal, params, text, context, t_context=None):
    return causal.forced_velocity(params, text, context, t_context)


def everything(form, causal, with_times):
    """Value, tangents along x and t, along the context too, and the gradient of a loss that holds a jvp."""
    shape = (2, causal.frames, *SIZE, MODEL.in_channels)
    context, x, dx, dc, noise = (normal(i, *shape) for i in range(5))
    t_context = jnp.linspace(0, 0.9, 2 * causal.frames).reshape(2, -1) if with_times else None

    def run(params):
        v = form(causal, params, TEXT, context, t_context)
        student = jax.jvp(v, (x, T), (dx, jnp.ones_like(T)))
        of_context = jax.jvp(lambda c, x: form(causal, params, TEXT, c, t_context)(x, T), (context, x), (dc, dx))[1]

        def loss(params, context):
            v = form(causal, params, TEXT, context, t_context)
            return rf_scm_loss(v, lambda x, t: dx, context, noise, T, warmup=0.7)[0].sum()

        return student, of_context, jax.grad(loss, (0, 1))(params, context)

    return run


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 + 1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("causal", "with_times"),
    [
        pytest.param(
            network("c1-1", 4, window=2, sink=1), True, id="window, sink, noisy context", marks=pytest.mark.long
        ),
        pytest.param(network("c3-1", 5), False, id="a long first chunk", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_it_is_the_packed_sequence(params, causal, with_times):
    got, want = (jax.jit(everything(form, causal, with_times))(params) for form in (beside, packed))
    assert_equal(got, want)


def scm_gradient(causal, params):
    shape = (2, causal.frames, *SIZE, MODEL.in_channels)
    clean, noise, teacher = (normal(i, *shape) for i in range(3))

    def loss(params):
        v = causal.forced_velocity(params, TEXT, clean)
        loss, terms = rf_scm_loss(v, lambda x, t: teacher, clean, noise, T, warmup=0.7)
        return loss.sum(), terms["t_v"]

    return jax.jit(jax.grad(loss, has_aux=True))(params)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.slow
def test_fused_attention_gives_the_same(params, remat):
    """The context then has attention that may be differentiated without a jvp."""
    dit = DiT(dataclasses.replace(MODEL, remat=remat))
    assert_equal(scm_gradient(network(dit=fused_under_jvp(dit)), params), scm_gradient(network(dit=dit), params))


@pytest.mark.parametrize("sequence", [pytest.param(2, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.slow)])
def test_a_mesh_gives_the_numbers_of_one_device(params, sequence):
    """15 tokens a video over two devices, and the context's as many: each is padded at its own end."""
    mesh = make_mesh(1, 2, sequence, devices=jax.devices()[: 2 * sequence])
    want = scm_gradient(network(), params)
    with jax.set_mesh(mesh):
        cut = network(dit=DiT(MODEL, sharded_attention(mesh)))
        assert_equal(scm_gradient(cut, shard(params, mesh)), want)


def test_on_a_mesh_the_context_has_no_tangent_to_exchange():
    """There and back for the context, the same and the context's keys for the noisy video, whose tangent goes too."""
    mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
    causal, shape = network(dit=DiT(MODEL, sharded_attention(mesh))), (2, 5, *SIZE, MODEL.in_channels)
    context, x, dx = (normal(i, *shape) for i in range(3))

    def exchanges(run):
        with jax.set_mesh(mesh):
            return str(jax.make_jaxpr(run)(perturbed_params(MODEL))).count("all_to_all[")

    assert exchanges(lambda p: beside(causal, p, TEXT, context)(x, T)) == 2 + 3
    along = lambda p: jax.jvp(beside(causal, p, TEXT, context), (x, T), (dx, jnp.ones_like(T)))  # noqa: E731
    assert exchanges(along) == 2 + 3 + 2


@pytest.mark.long
def test_a_chunk_sees_the_context_before_it(params):
    """And a chunk sees the context before it: where its gradient goes."""
    causal, shape = network("c1-1", 3), (2, 3, *SIZE, MODEL.in_channels)
    context, x = normal(0, *shape), normal(1, *shape)

    def gradient(frame):
        out = lambda p, c: causal.forced_velocity(p, TEXT, c)(x, T)[:, frame].sum()  # noqa: E731
        return jax.jit(jax.grad(out, 1))(params, context)

    first, last = gradient(0), gradient(2)
    assert not np.any(first)
    assert np.all(np.abs(last[:, :2]).max((2, 3, 4)) > 1e-4)
    assert not np.any(last[:, 2])
