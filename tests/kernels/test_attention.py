"""Attention's numbers, memory and work, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.kernels import xla
from rcm_jax.kernels.attention import Backend, attention
from rcm_jax.kernels.backends import load_backend
from rcm_jax.kernels.masks import KeyRuns
from tests.kernels.attention_cases import (
    BACKENDS,
    DERIVATIVES,
    MASKS,
    Operands,
    blockwise,
    close,
    expected,
    first_order,
    operands,
    plain,
    square,
)

# --- numbers --------------------------------------------------------------------------------------------------------


def test_a_row_without_keys_is_zero(attend):
    """Rows 0 to 4 see nothing; with kv_len 0 nobody does."""
    a = operands()
    rest = a._replace(q=a.q[:, 5:], tq=a.tq[:, 5:], do=a.do[:, 5:])
    for kv_len in (jnp.int32(20), jnp.int32(6)):
        o, to, dq, dk, dv = first_order(attend, a, KeyRuns((5, 12), ((), ((2, 11),)), kv_len))
        for x in (o, to, dq):
            assert not x[:, :5].any()
        close((o[:, 5:], to[:, 5:], dq[:, 5:], dk, dv), first_order(plain, rest, KeyRuns((7,), (((2, 11),),), kv_len)))
    for x in first_order(attend, a, KeyRuns((5, 12), ((), ((2, 11),)), jnp.int32(0))):
        assert not x.any()


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_lse(name):
    a = operands()
    s = 0.5 * jnp.einsum("bsnd,btnd->bnst", a.q, a.k)
    mask = KeyRuns((5, 12), ((), ((2, 11),)))
    _, lse = load_backend(name).forward(*a.x, mask, 0.5)
    close(lse[:, :, 5:], jax.nn.logsumexp(s[:, :, 5:, 2:11], axis=-1))
    assert (lse[:, :, :5] == -jnp.inf).all()


def test_bfloat16_softmax_and_sums_are_wider():
    a = operands(jnp.bfloat16)
    sharp = functools.partial(plain, scale=2.0)
    exact, narrow = first_order(sharp, jax.tree.map(lambda x: x.astype(jnp.float32), a)), first_order(sharp, a)
    got = first_order(functools.partial(attention, scale=2.0, implementation=BACKENDS["blocks"]), a)
    for want, ours, theirs in zip(exact, got, narrow, strict=True):
        assert ours.dtype == jnp.bfloat16
        error, narrow_error = (np.linalg.norm(np.float32(x) - want) for x in (ours, theirs))
        assert error < 0.75 * narrow_error
        assert error < 0.01 * np.linalg.norm(want)


def test_large_scores_do_not_overflow(attend_xla):
    a = operands()
    x = (300 * a.q, a.k, a.v)
    close(jax.jit(attend_xla)(*x), plain(*x), 1e-4)


def test_float64():
    with jax.enable_x64(True):
        a, mask = operands(jnp.float64), MASKS["runs and kv_len"]
        f = functools.partial(attention, implementation=BACKENDS["blocks"])
        close(first_order(f, a, mask), first_order(plain, a, mask), 1e-13)


# --- memory and work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jvp", "vjp"])
def test_memory_is_linear_in_length(name):
    def temporaries(length):
        mask = KeyRuns((length // 2, length), (((0, length // 2),), ((0, length // 4), (length // 2, length))))
        f = functools.partial(attention, implementation=blockwise(32), mask=mask)
        x = Operands(*[jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)] * 7)
        compiled = jax.jit(functools.partial(DERIVATIVES[name], f)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(512), temporaries(2048)
    assert long < 4.5 * short
    assert long < 2 * 2048 * 2048  # a quarter of one float32 array of scores


def test_blocks_beyond_kv_len_are_not_read():
    """Keys that a kernel reads but does not see must be finite; those in later blocks may be anything."""
    a = operands()
    k, v = (x.at[:, 16:].set(jnp.nan) for x in (a.k, a.v))

    def run(k, v, n):
        f = functools.partial(attention, implementation=BACKENDS["blocks"], mask=KeyRuns(kv_len=n))
        return [DERIVATIVES[name](f, a._replace(k=k, v=v)) for name in ("jvp", "vjp")]

    close(jax.jit(run)(k, v, 9), list(expected(("jvp", "vjp"), ("kv_len",)).values()))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_errors_name_the_values():
    a = operands()
    cases = [
        (ValueError, r"rank 4, not q \(12, 4, 8\)", (a.q[0], a.k, a.v), {}),
        (ValueError, r"one batch size .* k \(1, 20, 4, 8\)", (a.q, a.k[:1], a.v), {}),
        (ValueError, r"number of heads .* v \(2, 20, 3, 6\)", (a.q, a.k, a.v[:, :, :3]), {}),
        (ValueError, r"same length .* v \(2, 19, 4, 6\)", (a.q, a.k, a.v[:, 1:]), {}),
        (ValueError, r"same length .* at least 1", (a.q, a.k[:, :0], a.v[:, :0]), {}),
        (ValueError, r"head width .* k \(2, 20, 4, 7\)", (a.q, a.k[..., 1:], a.v), {}),
        (TypeError, "one floating dtype, not bfloat16, float32, float32", (a.q.astype(jnp.bfloat16), a.k, a.v), {}),
        (TypeError, "one floating dtype, not int32", tuple(x.astype(jnp.int32) for x in a.x), {}),
        (ValueError, r"'flash' is not one of \['auto', 'reference', 'xla'", a.x, {"implementation": "flash"}),
        (ValueError, "for 3 queries .* q has 12", a.x, {"mask": KeyRuns((3,), ((),))}),
        (ValueError, "reach key 21, but k has only 20", a.x, {"mask": KeyRuns((12,), (((0, 21),),))}),
    ]
    for error, message, x, options in cases:
        with pytest.raises(error, match=message):
            attention(*x, **options)


def test_a_backend_may_refuse():
    def forward(q, k, v, mask, scale):
        raise NotImplementedError(f"head width {q.shape[-1]} is not a multiple of 64")

    a = operands()
    refusing = functools.partial(attention, implementation=Backend(forward, xla.tangent, xla.backward))
    for f in (refusing, jax.jit(refusing), jax.grad(square(refusing))):
        with pytest.raises(NotImplementedError, match="head width 8 is not a multiple of 64"):
            f(*a.x)
