"""`fused`: value and tangent from one kernel, derivatives as those of the split kernels, at no more than their cost."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.aot.compile import compile_for
from rcm_jax.kernels.attention import attention
from rcm_jax.wan.config import DiTConfig
from tests.benchmarks import fused_tangent
from tests.benchmarks.one_pass import Case, problem
from tests.kernels.attention_cases import close, matches, operands, plain
from tests.kernels.test_attention_derivatives import SAVE, one_pass, one_pass_operands

ALONG = ("scale", "jvp", "jvp along k", "jvp along a scalar", "vmap of jvp", "vmap along tangents")  # under jvp alone
TINY = DiTConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, in_channels=4, out_channels=4, freq_dim=16, text_dim=16,
                 text_len=8)  # fmt: skip

fused = functools.partial(attention, fused=True)

# --- numbers --------------------------------------------------------------------------------------------------------


def test_value_and_tangent(attend_xla):
    matches(functools.partial(attend_xla, fused=True), ALONG, ("none", "runs and kv_len"))


@pytest.mark.parametrize("policy", [SAVE, None], ids=["o and lse saved", "nothing saved"])
def test_one_pass_gradient_is_right_and_free_of_nan(attend_xla, policy):
    attend = functools.partial(attend_xla, fused=True)
    got, want = (
        jax.jit(functools.partial(one_pass, *x))(*one_pass_operands()) for x in ((attend, policy), (plain, None))
    )
    close(got, want)


@pytest.mark.parametrize("of", range(6), ids=["q", "k", "v", "tq", "tk", "tv"])
def test_the_derivative_of_the_tangent_is_nan(of):
    a = operands()

    def tangent(x):
        q, k, v, *t = (*a[:of], x, *a[of + 1 : 6])
        return jax.jvp(fused, (q, k, v), tuple(t))[1]

    @jax.jit
    def second(x, t):
        return jax.jvp(tangent, (x,), (t,))[1], jax.grad(lambda x: (tangent(x) ** 2).sum())(x)

    for derivative in second(a[of], a[of] + 1):
        assert jnp.isnan(derivative).all()


def test_a_gradient_without_jvp_raises():
    with pytest.raises(ValueError, match="Linearization failed"):
        jax.grad(lambda q: fused(q, *operands().x[1:]).sum())(operands().q)


# --- cost -----------------------------------------------------------------------------------------------------------


def test_one_pass_runs_each_kernel_once():
    """As the split kernels: none twice, where the policy sees o and lse."""

    def count(policy):
        text = str(jax.make_jaxpr(functools.partial(one_pass, fused, policy))(*one_pass_operands()))
        kinds = ("forward", "tangent", "fused", "backward", "second_derivative")
        return [text.count(f"= attention_{kind}[") for kind in kinds]

    assert count(SAVE) == [0, 0, 1, 1, 0]
    assert count(None) == [0, 0, 2, 1, 0]


@pytest.mark.long
@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "attention"])
def test_a_network_takes_no_more_work_than_with_split_kernels(remat):
    """On a CPU both are the same products. A reversed tangent path would be 1.4 to 1.6 times as many."""
    params, data = jax.eval_shape(functools.partial(problem, Case("tiny", TINY, 1, (4, 8, 8))))

    def flops(fused):
        step = fused_tangent.one_pass(dataclasses.replace(TINY, remat=remat), fused)
        return jax.jit(step).lower(params, data).compile().cost_analysis()["flops"]

    assert flops(True) <= flops(False)


@pytest.mark.aot
def test_one_pass_on_a_gpu_calls_each_kernel_once(absent_mesh):
    sharding = jax.sharding.NamedSharding(absent_mesh, jax.P())
    shapes = [jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding) for x in one_pass_operands()]

    def calls(attend):
        with jax.set_mesh(absent_mesh):
            hlo = compile_for(functools.partial(one_pass, attend, SAVE), *shapes).hlo
        lines = [line for line in hlo.splitlines() if "custom-call" in line]
        return collections.Counter(re.search(r"attention_(forward|tangent|fused|dq|dkv)\b", x)[1] for x in lines)

    assert calls(attention) == {"forward": 1, "tangent": 1, "dq": 1, "dkv": 1}
    assert calls(fused) == {"fused": 1, "dq": 1, "dkv": 1}
