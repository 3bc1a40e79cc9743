"""What teacher forcing computes: matrix products of a program, counted from its jaxpr.

    python -m tests.causal.test_products        the figures, at c1-1 and 21 chunks

Attention counts pairs of a query and a key that it may see, times the products of a pair, whatever a backend does
beyond them; `forward` has two, `tangent` one for the scores, and one for each of tq kᵀ, q tkᵀ, (P∘tS) v and P tv that
is not left out, `backward` five. Unit: multiply-adds. Everything else that multiplies matrices is `dot_general`.
"""

import collections
import functools
import math

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkPattern
from rcm_jax.kernels.attention import attention
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.losses.consistency import rf_scm_loss
from rcm_jax.wan.dit import MODEL_TIME, DiT
from tests.packed import pack
from tests.tiny import MODEL, perturbed_params

CHUNKS, SIZE = 21, (4, 4)


# --- the counter ----------------------------------------------------------------------------------------------------


def pairs(mask: KeyRuns | None, queries: int, keys: int) -> int:
    """(query, key) pairs that the mask allows."""
    if mask is None or not mask.query_ends:
        return queries * keys
    rows = np.diff((0, *mask.query_ends))
    return sum(int(n) * sum(b - a for a, b in runs) for n, runs in zip(rows, mask.runs, strict=True))


def of_attention(equation) -> int:
    arrays, mask = jax.tree.unflatten(equation.params["tree"], [v.aval for v in equation.invars])
    q, k = arrays[:2]
    tangents = arrays[-3:]
    moving = [t is not None for t in tangents]
    tangent = moving[0] + moving[1] + any(moving[:2]) + moving[2]
    products = {"forward": 2, "tangent": 1 + tangent, "fused": 2 + tangent, "backward": 5}
    B, S, N, D = q.shape
    return B * N * D * pairs(mask, S, k.shape[1]) * products[equation.primitive.name.removeprefix("attention_")]


def of_dot(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def products(jaxpr, times: int = 1) -> collections.Counter:
    """Multiply-adds by what does them: "linear", "attention_forward", "attention_tangent", …"""
    total = collections.Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total["linear"] += times * of_dot(equation)
        elif name.removeprefix("attention_") in ("forward", "tangent", "backward", "fused"):
            total[name] += times * of_attention(equation)
        else:
            inside = times * equation.params["length"] if name == "scan" else times
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                total += products(inner, inside)
    return total


def count(function, *arguments) -> collections.Counter:
    return products(jax.make_jaxpr(function)(*arguments).jaxpr)


# --- the forms ------------------------------------------------------------------------------------------------------


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


SHAPE = (1, CHUNKS, *SIZE, MODEL.in_channels)
CLEAN, NOISY, TANGENT, NOISE = (normal(i, *SHAPE) for i in range(4))
TEXT, T = normal(4, 1, MODEL.text_len, MODEL.text_dim), jnp.array([0.4])
NETWORK = CausalDiT(DiT(MODEL), ChunkPattern(1, 1), CHUNKS, SIZE)


def packed(network: CausalDiT, params, text, context, t_context=None):
    """Teacher forcing as one sequence of twice the length, [context | noisy], as the published code has it."""

    def v(x, t):
        full, times = pack(context, x, t, t_context)
        frames, mask = np.tile(np.arange(x.shape[1]), 2), network.forcing_mask(x.shape[1])
        out = network.dit.apply({"params": params}, full, MODEL_TIME * times, text, mask=mask, frames=frames)
        return out[:, x.shape[1] :]

    return v


FORMS = {"packed": packed, "beside": CausalDiT.forced_velocity}


def value(form, params):
    return form(NETWORK, params, TEXT, CLEAN)(NOISY, T)


def both(form, params):
    return jax.jvp(form(NETWORK, params, TEXT, CLEAN), (NOISY, T), (TANGENT, jnp.ones_like(T)))


def gradient(form, params):
    """Of teacher-forced sCM: a jvp inside a gradient."""

    def loss(params):
        student, teacher = form(NETWORK, params, TEXT, CLEAN), lambda x, t: TANGENT
        return rf_scm_loss(student, teacher, CLEAN, NOISE, T, warmup=1.0)[0].sum()

    return jax.grad(loss)(params)


PROGRAMS = {"value": value, "value and tangent": both, "gradient of tf_scm": gradient}


def of_form(program, form) -> collections.Counter:
    return count(functools.partial(program, form), perturbed_params(MODEL))


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [both, gradient], ids=["jvp", "gradient"])
def test_the_context_has_no_tangent(program):
    """The tangent's products are those of the noisy video: its own linear layers, its rows of the mask."""
    counted, still = of_form(program, FORMS["beside"]), of_form(value, FORMS["beside"])
    S, D, text = CHUNKS * NETWORK.frame_tokens, MODEL.dim, MODEL.text_len
    seen, own = (pairs(mask, S, S) for mask in NETWORK.forced_masks(CHUNKS))
    assert counted["attention_tangent"] == MODEL.num_layers * D * (3 * seen + 5 * own + 3 * S * text)  # nor does text
    if program is both:
        alone = count(lambda p: NETWORK.velocity(p, TEXT)(NOISY, T), perturbed_params(MODEL))
        tangent = counted["linear"] - still["linear"]
        assert 0.5 * alone["linear"] < tangent < alone["linear"]


def test_no_form_computes_more_than_the_packed_one():
    for program in PROGRAMS.values():
        old, new = (of_form(program, form) for form in FORMS.values())
        assert all(new[name] <= old[name] for name in old | new)


def test_what_is_counted():
    """The counter itself, against numbers by hand."""
    q, k = jnp.ones((2, 6, 3, 4)), jnp.ones((2, 5, 3, 4))
    mask = KeyRuns((2, 6), (((0, 1),), ((0, 1), (2, 5))))
    pair, seen = 2 * 3 * 4, 2 * 1 + 4 * 4
    counted = count(lambda q: jax.jvp(lambda q: attention(q, k, k, mask=mask), (q,), (q,)), q)
    assert counted == {"attention_forward": 2 * pair * seen, "attention_tangent": 3 * pair * seen}
    twice = count(lambda x: jax.lax.scan(lambda x, _: (x @ jnp.ones((4, 4)), None), x, length=7)[0], jnp.ones((3, 4)))
    assert twice == {"linear": 7 * 3 * 4 * 4}


def main() -> None:
    print(f"{CHUNKS} chunks c1-1, packed and beside, in multiply-adds")
    for name, program in PROGRAMS.items():
        old, new = (of_form(program, form) for form in FORMS.values())
        print(name)
        for key in sorted(old | new):
            print(f"  {key:20s} {old[key]:12d} {new[key]:12d}  {old[key] / new[key]:6.2f}")


if __name__ == "__main__":
    main()
