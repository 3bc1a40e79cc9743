"""Derivatives of attention, one at a time and both of a loss that holds a jvp in one pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rcm_jax.kernels.attention import attention
from rcm_jax.kernels.masks import KeyRuns
from tests.kernels.attention_cases import (
    BACKENDS,
    DERIVATIVES,
    MASKS,
    close,
    derivatives,
    expected,
    matches,
    operands,
    plain,
    several,
    square,
)

SAVE = jax.checkpoint_policies.save_only_these_names("attention_o", "attention_lse")


# --- derivatives ----------------------------------------------------------------------------------------------------


def test_derivatives(attend_xla):
    matches(attend_xla, tuple(DERIVATIVES))


def test_derivatives_under_masks(attend):
    matches(attend, ("jvp", "vjp"), ("causal", "runs and kv_len"))


def test_without_jit():
    f = functools.partial(attention, implementation=BACKENDS["blocks"], mask=MASKS["kv_len"])
    close(jax.jvp(f, operands().x, operands().t), expected(("jvp",), ("kv_len",))["jvp", "kv_len"])


def test_backward_is_the_transpose_of_tangent(attend_xla):
    a = operands()
    result = derivatives(attend_xla, ("jvp", "vjp"), ("causal",))
    (_, to), grads = result["jvp", "causal"], result["vjp", "causal"]
    transposed = sum(np.vdot(g, t) for g, t in zip(grads, a.t, strict=True))
    np.testing.assert_allclose(np.vdot(a.do, to), transposed, rtol=1e-4)


def test_vmap_over_kv_len(attend_xla):
    a, lengths = operands(), (3, 20, 11)

    def of_one(f, q, n):
        g = functools.partial(f, mask=KeyRuns(kv_len=n))
        return jax.jvp(g, (q, a.k, a.v), a.t), jax.grad(square(g), (0, 1))(q, a.k, a.v)

    one, all_of_them = (
        jax.jit(functools.partial(of_one, plain)),
        jax.jit(jax.vmap(functools.partial(of_one, attend_xla))),
    )
    want = [one(q, n) for q, n in zip(several(a.q), lengths, strict=True)]
    got = all_of_them(several(a.q), jnp.array(lengths))
    close(got, jax.tree.map(lambda *x: jnp.stack(x), *want))

    @jax.grad
    def of_sum(k):
        o = jax.vmap(lambda q, n: attend_xla(q, k, a.v, mask=KeyRuns(kv_len=n)))(several(a.q), jnp.array(lengths))
        return (o**2).sum()

    close(jax.jit(of_sum)(a.k), sum(w[1][1] for w in want))


def test_shard_map(attend_xla):
    mesh = jax.make_mesh((min(2, jax.device_count()),), ("heads",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, None, "heads")

    def sharded(*x, mask):
        del mask
        return jax.shard_map(attend_xla, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(*x)

    matches(sharded, ("jvp", "vjp", "grad of q"))


# --- the one-pass gradient ------------------------------------------------------------------------------------------


def network(attend, w, x, t, policy):
    """A scan of rematerialised blocks, time entering each of them."""

    def block(x, wi):
        qkv = jnp.split(jnp.tanh(x @ wi) * jnp.cos(t), 3, -1)
        return x + attend(*(z.reshape(*z.shape[:-1], 2, -1) for z in qkv)).reshape(x.shape), None

    return jax.lax.scan(jax.checkpoint(block, policy=policy), x, w)[0]


def one_pass(attend, policy, w, x, t, tx):
    """F, dF/dt and the gradient of a loss with dF/dt in its target, as in the consistency loss."""

    def loss(w):
        F, dF = jax.jvp(lambda x, t: network(attend, w, x, t, policy), (x, t), (tx, jnp.ones_like(t)))
        target = jax.lax.stop_gradient(F - 0.1 * dF)
        return ((F - target * jnp.cos(t)) ** 2).mean(), (F, dF)

    return jax.grad(loss, has_aux=True)(w)


def one_pass_operands():
    rng = np.random.default_rng(1)
    w, x, tx = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(3, 16, 48), (2, 20, 16), (2, 20, 16)])
    return 0.3 * w, x, jnp.float32(0.3), tx


def test_one_pass_gradient_is_right_and_free_of_nan(attend_xla):
    got, want = (
        jax.jit(functools.partial(one_pass, *x))(*one_pass_operands()) for x in ((attend_xla, SAVE), (plain, None))
    )
    close(got, want)


def test_one_pass_runs_each_kernel_once():
    """One forward, one tangent and one backward kernel a layer, if the policy sees the names."""

    def count(policy):
        text = str(jax.make_jaxpr(functools.partial(one_pass, attention, policy))(*one_pass_operands()))
        return [text.count(f"= attention_{kind}[") for kind in ("forward", "tangent", "backward", "second_derivative")]

    assert count(SAVE) == [1, 1, 1, 0]
    assert count(None) == [2, 1, 1, 0]


@pytest.mark.parametrize("of", range(3), ids="qkv")
def test_second_order_is_nan(of):
    a = operands()

    def at(x):
        return (*a.x[:of], x, *a.x[of + 1 :])

    def tangent(x):
        return jax.jvp(attention, at(x), a.t)[1]

    def gradient(x):
        return jax.grad(square(attention), 2)(*at(x))

    @jax.jit
    def second(x, t):
        return [(jax.jvp(first, (x,), (t,))[1], jax.grad(square(first))(x)) for first in (tangent, gradient)]

    for derivative in jax.tree.leaves(second(a.x[of], a.t[of])):
        assert jnp.isnan(derivative).all()


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_stop_gradient_keeps_the_nan_out_without_scan_and_remat(fused):
    a = operands()

    def loss(f, x):
        o, to = jax.jvp(f, x, a.t)
        return ((o - jax.lax.stop_gradient(o + to)) ** 2).sum()

    functions = functools.partial(attention, fused=fused), plain
    got, want = (jax.jit(jax.grad(functools.partial(loss, f)))(a.x) for f in functions)
    close(got, want)
