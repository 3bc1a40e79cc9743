import functools
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
    "kv_len": KeyRuns(kv_len=9),
    "runs and kv_len": KeyRuns(*CHUNKS, kv_len=18),
}
SAVE = jax.checkpoint_policies.save_only_these_names("attention_o", "attention_lse")


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    """Nearly all the time of these tests goes into compiling; unoptimised code is as right and takes half of it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(params=BACKENDS)
def attend(request):
    return functools.partial(attention, implementation=BACKENDS[request.param])


@pytest.fixture(params=["xla", "blocks"])
def attend_xla(request):
    return functools.partial(attention, implementation=BACKENDS[request.param])


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


def test_stop_gradient_keeps_the_nan_out_without_scan_and_remat():
    a = operands()

    def loss(f, x):
        o, to = jax.jvp(f, x, a.t)
        return ((o - jax.lax.stop_gradient(o + to)) ** 2).sum()

    got, want = (jax.jit(jax.grad(functools.partial(loss, f)))(a.x) for f in (attention, plain))
    close(got, want)


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
