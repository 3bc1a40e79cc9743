"""A past that is read as it is stored, before RoPE or in few bytes, is the one that is made of it first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.kernels import pallas_triton, reference
from rcm_jax.kernels.attention import Past, attention
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.tiles import Tiles
from rcm_jax.wan.rope import rope_table
from tests.kernels.attention_cases import close

SMALL = Tiles(16, 16)
L, B, S, N = 2, 2, 20, 2


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def rope(tokens, width):
    return rope_table((tokens // 4, 2, 2), width, jnp.arange(3, 3 + tokens // 4))


def unturned(width, tokens=40, dtype=jnp.float32):
    keys = (normal(i, L, B, tokens, N, width, dtype=dtype) for i in (1, 2))
    return Past(*keys, layer=jnp.int32(1), rope=rope(tokens, width))


@functools.partial(jax.jit, static_argnames=("parts",))
def read(q, past, kv_len, parts=1):
    return pallas_triton.forward_of_past(q, past, KeyRuns(kv_len=kv_len), 0.2, tiles=SMALL, parts=parts)


@jax.jit
def made(q, past, kv_len):
    return reference.forward(q, *past.one(q.dtype), KeyRuns(kv_len=kv_len), 0.2)


@pytest.mark.parametrize(("width", "kv_len", "parts"), [(16, 40, 1), (12, 17, 2), (24, 0, 1), (64, 33, 1)])
def test_keys_before_rope(width, kv_len, parts):
    q, past = normal(0, B, S, N, width), unturned(width)
    close(read(q, past, kv_len, parts=parts), made(q, past, kv_len))


def test_keys_before_rope_in_bfloat16():
    """As near to float32's result as what turns them in memory, for which keys are rounded as often."""
    q, past = normal(0, B, S, N, 64, dtype=jnp.bfloat16), unturned(64, dtype=jnp.bfloat16)
    wide = made(*jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, (q, past)), 33)
    errors = [np.abs(np.asarray(f(q, past, 33)[0], np.float32) - wide[0]).max() for f in (read, made)]
    assert errors[0] < 1.3 * errors[1] < 0.02


def chunk(past, **static):
    """o of a chunk of 20 tokens behind the past, as a function of its own q, k, v."""
    x = [normal(i, B, S, N, 16) for i in (3, 4, 5)]
    masked = past._replace(mask=KeyRuns(kv_len=17))
    return lambda q, k, v: attention(q, k, v, past=masked, **static), x


@pytest.mark.parametrize("backend", ["xla", "pallas_triton"])
def test_the_op_and_its_derivatives(backend):
    """With tangents and gradients the past is made for the rule, and read for the value."""
    past = unturned(16)
    in_place, x = chunk(past, implementation=backend)
    apart, _ = chunk(past.made(jnp.float32), implementation="xla")

    def derivatives(f):
        moving = [jnp.cos(y) for y in x]
        return jax.jvp(f, x, moving), jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2))(*x)

    close(jax.jit(lambda: derivatives(in_place))(), jax.jit(lambda: derivatives(apart))())
