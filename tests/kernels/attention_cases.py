"""Operands, masks and derivatives of attention, and what they are compared with."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.kernels import xla
from rcm_jax.kernels.attention import Backend
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
    "kv_len": KeyRuns(kv_len=9),
    "runs and kv_len": KeyRuns(*CHUNKS, kv_len=18),
}


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
    rng = np.random.default_rng(0)
    return Operands(*(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes))


def close(got, want, tolerance=2e-5, case=""):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()), err_msg=str(case))


def square(f):
    return lambda *x: (f(*x) ** 2).sum()


def several(x, axis=0):
    return jnp.stack([x, 0.5 * x, -x], axis)


DERIVATIVES = {
    "scale": lambda f, a: jax.jvp(functools.partial(f, scale=0.1), a.x, a.t),
    "jvp": lambda f, a: jax.jvp(f, a.x, a.t),
    "jvp along k": lambda f, a: jax.jvp(lambda k: f(a.q, k, a.v), (a.k,), (a.tk,)),
    "jvp along a scalar": lambda f, a: jax.jvp(lambda t: f(t * a.q, a.k, t * a.v), (2.0,), (1.0,)),
    "linearize": lambda f, a: jax.linearize(f, *a.x)[1](*a.t),
    "vjp": lambda f, a: jax.vjp(f, *a.x)[1](a.do),
    "grad of q": lambda f, a: jax.grad(lambda q: square(f)(q, a.k, a.v))(a.q),
    "grad of k, v": lambda f, a: jax.grad(square(f), (1, 2))(*a.x),
    "vmap": lambda f, a: jax.vmap(f, (0, None, 3), 1)(several(a.q), a.k, several(a.v, 3)),
    "vmap of jvp": lambda f, a: jax.vmap(lambda x, t: jax.jvp(f, x, t))(*jax.tree.map(several, (a.x, a.t))),
    "vmap along tangents": lambda f, a: jax.vmap(lambda tk: jax.jvp(f, a.x, (a.tq, tk, a.tv))[1])(several(a.tk)),
    "vmap of grad": lambda f, a: jax.vmap(jax.grad(square(f), (0, 1, 2)), (0, None, 0))(
        several(a.q), a.k, several(a.v)
    ),
    "grad of vmap": lambda f, a: jax.grad(square(jax.vmap(f, (0, None, None))), (0, 1))(several(a.q), a.k, a.v),
}


@functools.partial(jax.jit, static_argnums=0)
def first_order(f, a, mask=None):
    """o, to, dq, dk, dv."""
    f = functools.partial(f, mask=mask)
    return *jax.jvp(f, a.x, a.t), *jax.vjp(f, *a.x)[1](a.do)


def derivatives(f, names, masks):
    """name, mask -> result, all in one program: compiling is what these tests spend their time on."""

    def run(a, masks):  # a traced kv_len
        return {(n, m): DERIVATIVES[n](functools.partial(f, mask=mask), a) for m, mask in masks.items() for n in names}

    return jax.jit(run)(operands(), {m: MASKS[m] for m in masks})


@functools.cache
def expected(names, masks):
    return derivatives(plain, names, masks)


def matches(f, names, masks=("none",)):
    got, want = (derivatives(f, names, masks), expected(names, masks))
    for case in want:
        close(got[case], want[case], case=case)
