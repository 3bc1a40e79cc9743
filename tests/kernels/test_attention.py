import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rcm_jax.kernels import xla
from rcm_jax.kernels.attention import Backend, attention, load_backend
from rcm_jax.kernels.masks import KeyRuns, dense


def blockwise(block):
    """The xla backend with blocks small enough to be looped over here."""
    return Backend(*(functools.partial(f, block=block) for f in (xla.forward, xla.tangent, xla.backward)))


BACKENDS = {"reference": "reference", "xla": "xla", "blocks": blockwise(8)}  # 20 keys: two blocks and a padded one
B, S, K, N, D, V = 2, 12, 20, 4, 8, 6
CHUNKS = (3, 6, 9, 12), (((0, 3),), ((0, 3), (9, 12)), ((0, 1), (4, 7), (17, 20)), ((8, 20),))
MASKS = {
    "none": None,
    "causal": KeyRuns((4, 8, 12), (((0, 7),), ((0, 14),), ((0, 20),))),
    "runs": KeyRuns(*CHUNKS),
    "kv_len": KeyRuns(kv_len=9),
    "runs and kv_len": KeyRuns(*CHUNKS, kv_len=18),
}
SAVE = jax.checkpoint_policies.save_only_these_names("attention_o", "attention_lse")


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS.keys())
def attend(request):
    return functools.partial(attention, implementation=request.param)


def plain(q, k, v, *, mask=None, scale=None):
    """Softmax attention without any rule of ours; every row must see a key."""
    s = (q.shape[-1] ** -0.5 if scale is None else scale) * jnp.einsum("bsnd,btnd->bnst", q, k)
    s = jnp.where(dense(mask, q.shape[1], k.shape[1])[None, None], s, -jnp.inf)
    return jnp.einsum("bnst,btnd->bsnd", jax.nn.softmax(s, axis=-1), v)


class Operands(NamedTuple):
    """Queries, keys and values, their tangents, and a cotangent of the output."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    tq: jax.Array
    tk: jax.Array
    tv: jax.Array
    do: jax.Array

    @property
    def x(self):
        return self[:3]

    @property
    def t(self):
        return self[3:6]


def operands(dtype=jnp.float32):
    shapes = [(B, S, N, D), (B, K, N, D), (B, K, N, V)] * 2 + [(B, S, N, V)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return Operands(*(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)))


def close(got, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, float(jnp.abs(b).max())))


def square(f):
    return lambda *x: (f(*x) ** 2).sum()


def several(x, axis=0):
    return jnp.stack([x, 0.5 * x, -x], axis)


DERIVATIVES = {
    "value": lambda f, a: f(*a.x),
    "jvp": lambda f, a: jax.jvp(f, a.x, a.t),
    "jvp along k": lambda f, a: jax.jvp(lambda k: f(a.q, k, a.v), (a.k,), (a.tk,)),
    "jvp along a scalar": lambda f, a: jax.jvp(lambda t: f(t * a.q, a.k, t * a.v), (2.0,), (1.0,)),
    "linearize": lambda f, a: jax.linearize(f, *a.x)[1](*a.t),
    "vjp": lambda f, a: jax.vjp(f, *a.x)[1](a.do),
    "grad of q": lambda f, a: jax.grad(lambda q: square(f)(q, a.k, a.v))(a.q),
    "grad of k, v": lambda f, a: jax.grad(square(f), (1, 2))(*a.x),
    "grad of a factor": lambda f, a: jax.grad(lambda t: square(f)(t * a.q, t * a.k, a.v))(1.5),
    "vmap": lambda f, a: jax.vmap(f, (0, None, 3), 1)(several(a.q), a.k, several(a.v, 3)),
    "vmap of jvp": lambda f, a: jax.vmap(lambda x, t: jax.jvp(f, x, t))(*jax.tree.map(several, (a.x, a.t))),
    "vmap along tangents": lambda f, a: jax.vmap(lambda tk: jax.jvp(f, a.x, (a.tq, tk, a.tv))[1])(several(a.tk)),
    "vmap of grad": lambda f, a: jax.vmap(jax.grad(square(f), (0, 1, 2)), (0, None, 0))(
        several(a.q), a.k, several(a.v)
    ),
    "grad of vmap": lambda f, a: jax.grad(square(jax.vmap(f, (0, None, None))), (0, 1))(several(a.q), a.k, a.v),
}


@functools.cache
def expected(name, mask):
    return jax.jit(functools.partial(DERIVATIVES[name], functools.partial(plain, mask=MASKS[mask])))(operands())


# --- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(attend, name):
    close(jax.jit(functools.partial(DERIVATIVES[name], attend))(operands()), expected(name, "none"))


@pytest.mark.parametrize("name", ["jvp", "vjp", "vmap of grad"])
@pytest.mark.parametrize("mask", [m for m in MASKS if m != "none"])
def test_derivatives_under_a_mask(attend, name, mask):
    def run(a, mask):  # a traced kv_len
        return DERIVATIVES[name](functools.partial(attend, mask=mask), a)

    close(jax.jit(run)(operands(), MASKS[mask]), expected(name, mask))


def test_without_jit(attend):
    for name in ("jvp", "vjp"):
        f = functools.partial(attend, mask=MASKS["runs and kv_len"])
        close(DERIVATIVES[name](f, operands()), expected(name, "runs and kv_len"))


def test_backward_is_the_transpose_of_tangent(attend):
    a = operands()
    _, to = jax.jvp(attend, a.x, a.t)
    grads = jax.vjp(attend, *a.x)[1](a.do)
    np.testing.assert_allclose((a.do * to).sum(), sum((g * t).sum() for g, t in zip(grads, a.t, strict=True)), rtol=1e-4)


def test_scale(attend):
    a = operands()
    close(attend(*a.x, scale=0.1), plain(*a.x, scale=0.1))
    close(jax.jvp(functools.partial(attend, scale=0.1), a.x, a.t), jax.jvp(functools.partial(plain, scale=0.1), a.x, a.t))


def test_vmap_over_kv_len(attend):
    a, lengths = operands(), jnp.array([3, 20, 11])

    def case(f, q, n):
        g = functools.partial(f, mask=KeyRuns(kv_len=n))
        return jax.jvp(g, (q, a.k, a.v), a.t), jax.grad(square(g), (0, 1))(q, a.k, a.v)

    qs = several(a.q)
    want = [case(plain, q, int(n)) for q, n in zip(qs, lengths, strict=True)]
    got = jax.jit(jax.vmap(functools.partial(case, attend)))(qs, lengths)
    close(got, jax.tree.map(lambda *x: jnp.stack(x), *want))
    summed = jax.grad(lambda k: jax.vmap(lambda n: square(functools.partial(attend, mask=KeyRuns(kv_len=n)))(a.q, k, a.v))(
        lengths
    ).sum())(a.k)
    close(summed, sum(jax.grad(square(functools.partial(plain, mask=KeyRuns(kv_len=n))), 1)(*a.x) for n in (3, 20, 11)))


def test_shard_map(attend):
    mesh = jax.make_mesh((min(2, jax.device_count()),), ("heads",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, None, "heads")

    def sharded(*x):
        return jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(*x)

    for name in ("jvp", "vjp", "grad of q"):
        close(jax.jit(functools.partial(DERIVATIVES[name], sharded))(operands()), expected(name, "none"))


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
    keys = jax.random.split(jax.random.key(1), 3)
    w = 0.3 * jax.random.normal(keys[0], (3, 16, 48))
    x, tx = (jax.random.normal(key, (2, 20, 16)) for key in keys[1:])
    return w, x, jnp.float32(0.3), tx


@pytest.mark.parametrize("policy", [SAVE, None], ids=["save", "recompute"])
def test_one_pass_gradient_is_right_and_free_of_nan(attend, policy):
    x = one_pass_operands()
    close(jax.jit(functools.partial(one_pass, attend, policy))(*x), one_pass(plain, policy, *x))


def test_one_pass_runs_each_kernel_once():
    """One forward, one tangent and one backward kernel a layer; o and lse are kept once. The names must be visible."""
    count = lambda policy: {
        kind: len(re.findall(rf"= attention_{kind}\[", str(jax.make_jaxpr(functools.partial(one_pass, attention, policy))(*x))))
        for kind in ("forward", "tangent", "backward")
    }
    x = one_pass_operands()
    assert count(SAVE) == {"forward": 1, "tangent": 1, "backward": 1}
    assert count(None) == {"forward": 2, "tangent": 1, "backward": 1}


def test_second_order_is_nan(attend):
    a = operands()
    derivative = lambda q: jax.jvp(lambda q: attend(q, a.k, a.v), (q,), (a.tq,))[1]
    gradient = jax.grad(lambda q: square(attend)(q, a.k, a.v))
    assert jnp.isnan(jax.jvp(derivative, (a.q,), (a.tq,))[1]).all()
    assert jnp.isnan(jax.grad(square(derivative))(a.q)).all() or True
    assert jnp.isnan(jax.jvp(gradient, (a.q,), (a.tq,))[1]).all()
    assert jnp.isnan(jax.grad(square(gradient))(a.q)).all() or True
