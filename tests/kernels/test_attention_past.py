"""Keys in two parts are the same keys in one, and cost less where one part stands still."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.kernels import masks
from rcm_jax.kernels.attention import Past, attention
from rcm_jax.kernels.masks import KeyRuns
from tests.causal.test_products import count, pairs
from tests.kernels.attention_cases import BACKENDS, close

B, S, P, K, N, D, V = 2, 12, 10, 14, 2, 8, 6
MASKS = {  # of the past, of the own keys
    "all": (None, None),
    "teacher forcing": (
        KeyRuns((4, 8, 12), ((), ((0, 4),), ((0, 2), (4, 8)))), KeyRuns((6, 12), (((0, 6),), ((6, 14),))),
    ),
    "blind rows": (KeyRuns((5, 12), (((3, 9),), ())), KeyRuns((3, 12), ((), ((2, 14),)))),
}  # fmt: skip
MOVING = {"all": "q kp vp k v", "own": "q k v", "past": "q kp vp", "own values": "v", "queries": "q", "none": ""}
NAMES = ("q", "kp", "vp", "k", "v")


def operands(dtype=jnp.float32):
    """q, k and v of the past, k, v, and their tangents."""
    rng = np.random.default_rng(0)
    shapes = [(B, S, N, D), (B, P, N, D), (B, P, N, V), (B, K, N, D), (B, K, N, V)] * 2
    x = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return dict(zip(NAMES, x[:5], strict=True)), dict(zip(NAMES, x[5:], strict=True))


def in_parts(x, which, **static):
    past, own = MASKS[which]
    return attention(x["q"], x["k"], x["v"], mask=own, past=Past(x["kp"], x["vp"], past), **static)


def in_one(x, which, **static):
    mask = masks.joined(MASKS[which], (P, K), S)
    k, v = (jnp.concatenate([x[f"{n}p"], x[n]], axis=1) for n in "kv")
    return attention(x["q"], k, v, mask=mask, **static)


def derivatives(attend, which):
    """Value and tangents of every choice of what moves, the gradients, and those of a loss that holds a jvp."""

    def run(x, t):
        out = {}
        for name, moving in MOVING.items():
            moving = moving.split()
            some = lambda y, moving=moving: attend(x | y, which)  # noqa: E731
            out[name] = jax.jvp(some, ({n: x[n] for n in moving},), ({n: t[n] for n in moving},))
        out["gradient"] = jax.grad(lambda x: (attend(x, which) ** 2).sum())(x)

        def loss(x):
            y = {n: x[n] for n in ("q", "k", "v")}
            o, to = jax.jvp(lambda y: attend(x | y, which), (y,), ({n: t[n] for n in y},))
            return (o**2).sum() + (o * jax.lax.stop_gradient(to)).sum()

        out["one pass"] = jax.grad(loss)(x)
        return out

    return jax.jit(run)(*operands())


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("pallas_triton", marks=pytest.mark.long)])
@pytest.mark.parametrize("which", MASKS)
def test_two_parts_are_the_keys_in_one(which, backend):
    static = {"implementation": BACKENDS.get(backend, backend)}
    got = derivatives(functools.partial(in_parts, **static), which)
    close(got, derivatives(functools.partial(in_one, implementation="xla"), which))


def test_fused_is_of_no_effect_and_no_harm():
    """With a past the gradient also flows without a jvp."""
    x, _ = operands()
    got, want = (jax.jit(jax.grad(lambda x, f=f: (f(x) ** 2).sum()))(x) for f in (
        lambda x: in_parts(x, "all", fused=True), lambda x: in_one(x, "all")))  # fmt: skip
    close(got, want)


def test_a_past_that_stands_still_costs_three_products_a_pair():
    x, _ = operands()
    for which in MASKS:
        own = {n: x[n] for n in ("q", "k", "v")}
        counted = count(lambda y, which=which: jax.jvp(lambda y: in_parts(x | y, which), (y,), (y,)), own)
        past, mine = (pairs(mask, S, keys) for mask, keys in zip(MASKS[which], (P, K), strict=True))
        assert counted["attention_tangent"] == B * N * D * (3 * past + 5 * mine)
        assert counted["attention_forward"] == B * N * D * 2 * (past + mine)


def test_masks_that_do_not_fit_are_refused():
    x, _ = operands()
    with pytest.raises(ValueError, match="must be without kv_len"):
        attention(x["q"], x["k"], x["v"], mask=KeyRuns(kv_len=3), past=Past(x["kp"], x["vp"]))
    with pytest.raises(ValueError, match="the mask's runs reach key 14, but k has only 10"):
        attention(x["q"], x["k"], x["v"], past=Past(x["kp"], x["vp"], MASKS["blind rows"][1]))
