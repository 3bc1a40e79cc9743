"""Attention over a sequence that lies on several devices, against attention on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.kernels.attention import attention
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.parallel import make_mesh, sharded_attention, ulysses

RUNS = (6, 15), (((0, 6),), ((0, 2), (5, 15)))
CASES = {  # queries, keys, mask; four devices share the sequence
    "even": (16, 16, None),
    "odd": (15, 15, None),
    "odd, runs": (15, 15, KeyRuns(*RUNS)),
    "odd, cache": (15, 15, KeyRuns(kv_len=9)),
    "odd, runs and cache": (15, 15, KeyRuns(*RUNS, kv_len=9)),
    "text": (15, 7, None),
    "text, some of it": (15, 7, KeyRuns(kv_len=5)),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=1, sequence=4)


def operands(S, K, N=4, B=2):
    rng = np.random.default_rng(0)
    shapes = [(B, S, N, 8), (B, K, N, 8), (B, K, N, 6)] * 2
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def derivatives(attend, mask, *x):
    """Value and tangent, gradients, and the gradient of a loss that holds a jvp."""
    attend = functools.partial(attend, mask=mask)

    def loss(w):
        o, to = jax.jvp(attend, tuple(w * a for a in x[:3]), tuple(w * a for a in x[3:]))
        return (o**2).sum() + (o * jax.lax.stop_gradient(to)).sum()

    gradients = jax.grad(lambda *a: (attend(*a) ** 2).sum(), (0, 1, 2))(*x[:3])
    return jax.jvp(attend, tuple(x[:3]), tuple(x[3:])), gradients, jax.grad(loss)(1.3)


@pytest.mark.parametrize("case", CASES)
def test_ulysses_is_attention(mesh, case):
    S, K, mask = CASES[case]
    x = operands(S, K)
    want = jax.jit(functools.partial(derivatives, attention))(mask, *x)
    with jax.set_mesh(mesh):
        got = jax.jit(functools.partial(derivatives, ulysses(mesh)))(mask, *x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def exchanges(f, *x):
    return str(jax.make_jaxpr(f)(*x)).count("all_to_all[")


def test_one_exchange_there_and_one_back(mesh):
    q, k, v, tq, tk, tv = operands(16, 16)
    attend = ulysses(mesh)
    assert exchanges(attend, q, k, v) == 2
    assert exchanges(lambda *t: jax.jvp(attend, (q, k, v), t), tq, tk, tv) == 4
    assert exchanges(attend, *operands(16, 7)[:3]) == 0, "text is whole on every device"


def test_batches_that_do_not_divide(mesh):
    x = operands(15, 15, B=3)[:3]
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(ulysses(mesh))(*x), attention(*x), atol=1e-5)


def test_one_device_needs_nothing():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert sharded_attention(mesh) is attention


def test_what_does_not_fit_is_named(mesh):
    with pytest.raises(ValueError, match=r"heads=6 must be divisible by mesh.sequence=4; use one of \[1, 2, 3, 6\]"):
        ulysses(mesh)(*operands(8, 8, N=6)[:3])
    with pytest.raises(NotImplementedError, match="one length"):
        ulysses(mesh)(*operands(15, 16)[:3], mask=KeyRuns(*RUNS))
    with pytest.raises(ValueError, match=r"mesh.sequence=3 does not divide the 8 devices"):
        make_mesh(sequence=3)
