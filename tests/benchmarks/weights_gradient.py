"""Forms of the product that is a weight's gradient, on CPUs, in turn: python -m tests.benchmarks.weights_gradient

The gradient of cpu_profile's network, where dW = xᵀ dy of every linear layer is left to JAX (`as it is`), or has a rule
of its own: the same product, xᵀ made by itself behind a barrier, or (dyᵀ x)ᵀ. Such a rule is for measuring alone:
jax.jvp does not go through it. Each form's time is told relative to `as it is` in the same round. XLA_FLAGS and
GLIBC_TUNABLES count.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import optimization_barrier as alone
from jaxtyping import Array, Float

from rcm_jax.wan.config import REMAT
from rcm_jax.wan.layers import Dense
from tests import benchmarks
from tests.benchmarks.cpu_profile import gradient

FORMS: dict[str, Callable[[Float[Array, "S I"], Float[Array, "S O"]], Float[Array, "I O"]]] = {
    "a rule of its own": lambda x, dy: x.T @ dy,
    "transposed before": lambda x, dy: alone(x.T) @ dy,
    "transposed after": lambda x, dy: alone(dy.T @ x).T,
}


def product(form: Callable) -> Callable:
    """What a linear layer takes as its `dot_general`."""

    @jax.custom_vjp
    def times(x, w):
        return x @ w

    def backward(kept, dy):
        x, w = kept
        return dy @ w.T, form(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))

    times.defvjp(lambda x, w: (x @ w, (x, w)), backward)
    return lambda x, w, dimensions, **_: times(x, w)


def compiled(remat: str, form: Callable | None) -> Callable:
    init = Dense.__init__
    if form is not None:
        init = functools.partialmethod(init, dot_general=product(form))
    with mock.patch.object(Dense, "__init__", init):
        lowered, weights = gradient(remat, written_out=False)
    return functools.partial(lowered.compile(), weights)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--remat", choices=REMAT, default="none")
    p.add_argument("--rounds", type=int, default=20)
    args = p.parse_args()
    calls = {name: compiled(args.remat, form) for name, form in ({"as it is": None} | FORMS).items()}
    want = jax.block_until_ready(calls["as it is"]())
    for name, call in calls.items():
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4, err_msg=name), call(), want)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want)) > 0.1
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
    print(json.dumps(benchmarks.machine("jax") | {"remat": args.remat}))
    for name, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(own, seconds["as it is"], strict=True))
        told = f"{statistics.median(ratios):.2f} [{ratios[len(ratios) // 4]:.2f}, {ratios[-len(ratios) // 4]:.2f}]"
        print(f"{name:20} {1e3 * statistics.median(own):6.0f} ms  {told} of the time as it is (median, quartiles)")


if __name__ == "__main__":
    main()
