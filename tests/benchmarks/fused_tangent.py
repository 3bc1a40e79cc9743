"""What the student part of the consistency step costs with `fused_tangent` and without, in forward passes.

    python -m tests.benchmarks.fused_tangent

FLOPs are the compiler's, for the program before optimisation with all blocks unrolled, as `one_pass` counts them; on a
CPU, where value and tangent of `fused` are one kernel after the other, so that the two should cost the same.
"""

import dataclasses
from collections.abc import Callable

import jax

from rcm_jax.flow import trig_velocity
from rcm_jax.losses.consistency import scm_loss
from rcm_jax.objectives.binding import fused_under_jvp
from rcm_jax.types import Params
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.dit import DiT, velocity
from tests.benchmarks.one_pass import CASES, Data, problem


def one_pass(config: DiTConfig, fused: bool) -> Callable[[Params, Data], tuple]:
    """(params, data) -> loss and gradient of the sCM loss, the teacher's F given."""
    dit = fused_under_jvp(DiT(config)) if fused else DiT(config)

    def loss(params: Params, data: Data) -> jax.Array:
        student = trig_velocity(velocity(dit, params, data.text))
        return scm_loss(student, lambda z, theta: data.F_teacher, data.x0, data.noise, data.theta, warmup=1.0)[0].mean()

    return jax.value_and_grad(loss)


def main() -> None:
    print(f"{'network':8s} {'remat':10s} {'split':>8s} {'fused':>8s}   forward passes")
    for case in CASES:
        params, data = problem(case)
        unrolled = dataclasses.replace(case.model, unroll=case.model.num_layers)

        def flops(function: Callable, *arguments) -> float:
            return jax.jit(function).lower(*arguments).cost_analysis()["flops"]

        forward = flops(DiT(unrolled).apply, {"params": params}, data.x0, data.theta, data.text)
        for remat in ("none", "attention"):
            config = dataclasses.replace(unrolled, remat=remat)
            split, fused = (flops(one_pass(config, fused), params, data) / forward for fused in (False, True))
            print(f"{case.name:8s} {remat:10s} {split:8.2f} {fused:8.2f}")


if __name__ == "__main__":
    main()
