"""A past that is read as it is stored, before RoPE or in few bytes, is the one that is made of it first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.causal.cache import Geometry, Ring
from rcm_jax.causal.quantised import quantised
from rcm_jax.chunks import ChunkPattern
from rcm_jax.kernels import pallas_triton, reference
from rcm_jax.kernels.attention import Past, attention
from rcm_jax.kernels.choice import not_read
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.tiles import Tiles
from rcm_jax.quant import CacheQuant, QuantConfig, laid_by_token, store
from rcm_jax.wan.layers import KeyValues
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


def in_few_bytes(keys, values=None, slots=2, width=16, batch=B):
    """So many slots of 20 tokens in each of two layers."""

    def stored(seed, config):
        x = normal(seed, L, slots, batch, S, N, width)
        return jax.vmap(jax.vmap(lambda x: laid_by_token(store(x, config)[0])))(x)

    k, v = stored(1, keys), stored(2, values or keys)
    return Past(k, v, layer=jnp.int32(1), rope=rope(slots * S, width))


def by(granularity, dtype, group=8):
    return QuantConfig(dtype, granularity=granularity, group_size=group)


by_token, by_channel = (functools.partial(by, granularity) for granularity in ("token", "channel"))


def same(past, kv_len=33, parts=1, dtype=jnp.float32):
    k, _ = past.one(dtype)
    q = normal(0, k.shape[0], S, N, k.shape[3], dtype=dtype)
    assert not_read(past, q) is None
    # what is stored comes back as bfloat16 where it is made, and is not rounded before it is turned where it is read
    close(read(q, past, kv_len, parts=parts), made(q, past, kv_len), 8e-3)


def some(*params, slow=()):
    return [*params, *(pytest.param(*x, marks=pytest.mark.slow) for x in slow)]


@pytest.mark.parametrize(("granularity", "dtype"), some(
    ("token", "int2"),
    slow=[("token", x) for x in ("bf16", "int8", "fp8", "int4", "fp4")]
    + [("channel", x) for x in ("int8", "fp8", "int4", "fp4", "int2")],
))  # fmt: skip
def test_codes_are_what_they_stand_for(granularity, dtype):
    """Every bit of values, which are rounded once: beside keys of zeros, one value at a time is all that is seen."""
    past = in_few_bytes(by(granularity, dtype), slots=1, batch=1)
    past = past._replace(rope=None, k=jnp.zeros((L, 1, S, N, 16)))
    values = past.one(jnp.bfloat16)[1].astype(jnp.float32)
    for row in (0, 7, 19):
        q = normal(0, 1, 1, N, 16, dtype=jnp.bfloat16)
        o, _ = read(q, past._replace(rows=jnp.array([row]), k=past.k.astype(jnp.bfloat16)), 1)
        np.testing.assert_array_equal(o[:, 0].astype(jnp.float32), values[:, row])


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2"])
def test_keys_and_values_in_few_bytes(dtype):
    same(in_few_bytes(by_token(dtype), batch=1))


@pytest.mark.parametrize(("group", "slots", "batch", "kv_len"), [
    (16, 3, 2, 47), pytest.param(0, 1, 2, 20, marks=pytest.mark.slow), pytest.param(4, 2, 2, 0, marks=pytest.mark.slow),
])  # fmt: skip
def test_groups_slots_and_samples(group, slots, batch, kv_len):
    """Where there are several samples and slots, a program finds its own sample's rows."""
    same(in_few_bytes(by_token("fp8", group), by_token("int4", group), slots, batch=batch), kv_len, parts=2)


@pytest.mark.parametrize(("keys", "values", "slots", "batch", "kv_len"), some(
    (by_channel("int4", 6), by_token("int8"), 3, 1, 47),
    slow=[
        (by_channel("int2", 64), by_channel("fp4", 7), 3, 2, 60),
        (by_channel("int8", 3), by("head", "int4", 48), 1, 2, 17),
        (by("tensor", "int4", 0), by("head", "int8", 0), 3, 1, 50),
    ],
))  # fmt: skip
def test_scales_of_several_tokens(keys, values, slots, batch, kv_len):
    """Groups end where a slot does, and anywhere in a tile."""
    same(in_few_bytes(keys, values, slots, batch=batch), kv_len, parts=1 + slots % 2)


@pytest.mark.parametrize("keys", some(by_token("bf16"), slow=[(by_channel("int4", 6),)]))
def test_in_another_order(keys):
    """Frames as a policy has them, some twice, some not at all; the table of RoPE is in that order, too."""
    past = in_few_bytes(keys, by_token("int4"))
    same(past._replace(rows=jnp.concatenate([jnp.arange(20, 40), jnp.arange(12, 24), jnp.arange(12, 20)])))


@pytest.mark.parametrize(
    ("config", "width", "reason"),
    [
        (by("head", "int4", 24), 16, "keys: bytes lie in the order of a head's groups, not by token"),
        (QuantConfig("int4", "balance", granularity="channel"), 16, "keys: balance has to be undone"),
        pytest.param(
            QuantConfig("int4", "hadamard", granularity="token"),
            16,
            "keys: hadamard has to be undone",
            marks=pytest.mark.slow,
        ),
        (by_token("int8"), 24, "keys: heads 24 wide: a power of two from 16 is read"),
    ],
)
def test_what_is_made_first(config, width, reason):
    past = in_few_bytes(config, width=width, slots=1, batch=1)
    q = normal(0, 1, S, N, width)
    assert not_read(past, q) == reason
    masked = past._replace(mask=KeyRuns(kv_len=17))
    got, want = (attention(q, q, q, past=p, implementation="xla") for p in (masked, masked.made(q.dtype)))
    close(got, want, 0)


@pytest.mark.parametrize(("slots", "read_so"), [(29, True), (30, False), (59, False), (60, True)])
def test_offsets_that_a_compiled_kernel_gets_wrong(slots, read_so):
    """Codes of a byte, of so many slots of a frame at 480p in each of 1.3B's layers: from 2 GiB to 4 GiB."""
    x = jax.ShapeDtypeStruct((1, 1560, 12, 128), jnp.bfloat16)
    one = jax.eval_shape(lambda x: laid_by_token(store(x, by_channel("int8"))[0]), x)
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((30, slots, *x.shape), x.dtype), one)
    reason = not_read(Past(stack, stack, layer=jnp.int32(1)), x)
    assert reason is None if read_so else reason.startswith("keys: Pallas counts")


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


@pytest.mark.parametrize(
    ("pattern", "config", "read_so"),
    [
        ("c2-2", by_token("int8"), True),
        ("c1-2", by_token("int8"), False),  # chunks of two sizes
        ("c2-2", QuantConfig("int8"), True),  # keys by channel
        ("c2-2", QuantConfig("int8", "hadamard"), False),
    ],
)
def test_a_policy_gives_its_slots_as_they_are(pattern, config, read_so):
    geometry = Geometry(ChunkPattern.parse(pattern), 8, (2, 2), L, N, 16, "float32")
    policy = quantised(Ring(3), CacheQuant(config, config))
    seen = policy.seen(geometry, policy.open(geometry, 1), jnp.int32(2), False)
    q = normal(0, 1, 8, N, 16)
    past, _ = seen.attend(lambda *_, past: past, q, KeyValues(q, q), rope(8, 16), jnp.int32(1))
    assert (not_read(past, q) is None) == read_so
    k, _ = past.one(q.dtype)
    assert k.shape == (1, (16 if pattern == "c2-2" else 20), N, 16)
