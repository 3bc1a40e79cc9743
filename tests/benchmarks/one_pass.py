"""The consistency step's student part in one pass against two passes, on the CPU, in turn.

    python -m tests.benchmarks.one_pass [--json OUT]

One pass: jax.value_and_grad of the sCM loss, which has jax.jvp inside: F, its tangent and the gradient of all
parameters from one program. Two passes, what a framework needs whose jvp gives no gradient: a jvp without gradient
that leaves the target, then the gradient of the loss with that target held fixed; two programs, so that the compiler
cannot merge their common forward pass. Included: noising, the student, the loss, the gradients. Not included: the
teacher, whose F is an input to both, and the optimiser, which are the same on either side. Gradients must agree.
Temporary memory is the compiler's figure (of the greater of the two programs), beside parameters and gradients. FLOPs
are the compiler's for the program before optimisation, all blocks unrolled: it counts a loop's body once.
Compilation is not in the times.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

import jax

from rcm_jax.configs import toy_teacher_start
from rcm_jax.flow import trig_noisy, trig_velocity
from rcm_jax.losses.consistency import consistency_loss, scm_loss
from rcm_jax.types import Params
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.dit import DiT, velocity
from tests import benchmarks
from tests.tiny import perturbed_params

DEEP = DiTConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=12, text_dim=256, text_len=32)
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its batch, and its latents (T, H, W)."""

    name: str
    model: DiTConfig
    batch: int
    latent: tuple[int, int, int]

    def title(self) -> str:
        c, tokens = self.model, 1
        for n in c.grid(self.latent):
            tokens *= n
        return (f"{self.name}: {c.num_layers} layers, dim {c.dim}, batch {self.batch}, "
                f"latents {(*self.latent, c.in_channels)}, {tokens} tokens")  # fmt: skip


CASES = (Case("toy", toy_teacher_start.MODEL, 16, (9, 6, 6)), Case("deep", DEEP, 2, (4, 16, 16)))


@dataclasses.dataclass(frozen=True)
class Data:
    x0: jax.Array
    noise: jax.Array
    theta: jax.Array
    F_teacher: jax.Array
    text: jax.Array


jax.tree_util.register_dataclass(Data, [f.name for f in dataclasses.fields(Data)], [])


def problem(case: Case) -> tuple[Params, Data]:
    c, params = case.model, perturbed_params(case.model, scale=0.02)
    keys = jax.random.split(jax.random.key(2), 5)
    shape = (case.batch, *case.latent, c.in_channels)
    x0, noise, F_teacher = (jax.random.normal(k, shape) for k in keys[:3])
    theta = jax.random.uniform(keys[3], (case.batch,), minval=0.1, maxval=1.4)
    return params, Data(x0, noise, theta, F_teacher, jax.random.normal(keys[4], (case.batch, c.text_len, c.text_dim)))


# --- the two ways ---------------------------------------------------------------------------------------------------


def passes(config: DiTConfig) -> dict[str, Callable]:
    """one(params, data) and gradient(params, data, g) give (loss, gradient); target(params, data) gives g."""

    def student(params: Params, data: Data):
        return trig_velocity(velocity(DiT(config), params, data.text))

    def consistency(params: Params, data: Data):
        teacher = lambda z, theta: data.F_teacher  # noqa: E731
        return scm_loss(student(params, data), teacher, data.x0, data.noise, data.theta, warmup=1.0)

    def one(params: Params, data: Data):
        return jax.value_and_grad(lambda p: consistency(p, data)[0].mean())(params)

    def target(params: Params, data: Data):
        return consistency(params, data)[1]["g_pre_norm"]

    def gradient(params: Params, data: Data, g: jax.Array):
        def loss(params: Params):
            F = student(params, data)(trig_noisy(data.x0, data.noise, data.theta), data.theta)
            return consistency_loss(F, g, 100.0)[0].mean()

        return jax.value_and_grad(loss)(params)

    return {"one": one, "target": target, "gradient": gradient}


def arguments(name: str, params: Params, data: Data) -> tuple:
    return (params, data, data.x0) if name == "gradient" else (params, data)


def flops(config: DiTConfig, params: Params, data: Data) -> dict[str, float]:
    """Of each program, and of the forward pass alone, without recomputation."""
    functions = passes(dataclasses.replace(config, unroll=config.num_layers))
    forward = DiT(dataclasses.replace(config, unroll=config.num_layers)).apply
    counts = {"forward": jax.jit(forward).lower({"params": params}, data.x0, data.theta, data.text).cost_analysis()}
    for name, function in functions.items():
        counts[name] = jax.jit(function).lower(*arguments(name, params, data)).cost_analysis()
    return {name: count["flops"] for name, count in counts.items()}


def compare(case: Case, remat: str, args) -> dict:
    config = dataclasses.replace(case.model, remat=remat)
    params, data = problem(case)
    programs = {
        name: jax.jit(function).lower(*arguments(name, params, data)).compile()
        for name, function in passes(config).items()
    }

    def one():
        return jax.block_until_ready(programs["one"](params, data))

    def two():
        return jax.block_until_ready(programs["gradient"](params, data, programs["target"](params, data)))

    differences = jax.tree.map(benchmarks.relative, one()[1], two()[1])
    worst = max(jax.tree.leaves(differences))
    if not worst < TOLERANCE:
        raise AssertionError(f"gradients of one and two passes differ by {worst:.1e}, more than {TOLERANCE}")
    seconds = benchmarks.time_in_turn({"one": one, "two": two}, args.rounds, args.calls)
    temp = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    count = flops(config, params, data)
    return {
        "case": case.name, "model": dataclasses.asdict(config), "batch": case.batch, "latent": case.latent,
        "worst_difference": worst, "seconds": seconds, "time_ratio": benchmarks.ratio(seconds["two"], seconds["one"]),
        "temp_bytes": {"one": temp["one"], "two": max(temp["target"], temp["gradient"])}, "temp_by_program": temp,
        "flops_by_program": count, "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "flops": {"one": count["one"], "two": count["target"] + count["gradient"]},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    parser.add_argument("--rounds", type=int, default=7, help="times that each way has its turn")
    parser.add_argument("--calls", type=int, default=5, help="timed calls a turn, of which the median counts")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    args = parser.parse_args()
    where = benchmarks.machine("jax", "jaxlib", "flax")
    print(", ".join(f"{k} {v}" for k, v in where.items()) + ", float32")
    results = []
    for case in CASES:
        if case.name not in args.cases:
            continue
        print(f"\n{case.title()}\nremat {'':12s} {'ms':>8s} {'temporary MiB':>14s} {'FLOPs / forward':>16s}")
        for remat in ("none", "attention"):
            r = compare(case, remat, args)
            results.append(r)
            for way in ("one", "two"):
                print(f"{remat:10s} {way + ' pass' + 'es' * (way == 'two'):11s} "
                      f"{1e3 * statistics.median(r['seconds'][way]):8.1f} {r['temp_bytes'][way] / 2**20:14.1f} "
                      f"{r['flops'][way] / r['flops_by_program']['forward']:16.2f}")  # fmt: skip
            memory, work = r["temp_bytes"]["two"] / r["temp_bytes"]["one"], r["flops"]["two"] / r["flops"]["one"]
            print(f"{'':6s} {'two / one':11s} time {benchmarks.spread(r['time_ratio'])}, memory {memory:.2f}, "
                  f"FLOPs {work:.2f}; gradients differ by {r['worst_difference']:.0e}", flush=True)  # fmt: skip
    benchmarks.write_json(args.json, {"machine": where, "results": results})


if __name__ == "__main__":
    main()
