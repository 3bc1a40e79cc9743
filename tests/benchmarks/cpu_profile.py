"""Where the gradient of the DiT spends its time on CPUs: python -m tests.benchmarks.cpu_profile --remat dots

The network of torch_dit. Milliseconds of a call (median of five), the pages that a call touches for the first time
(ru_minflt: what GLIBC_TUNABLES=glibc.malloc.hugetlb=1 saves), the program's temporaries, and by XLA's own profile which
share of the operations' time is what. Kinds are told from the compiled program: a fusion is what the first of KINDS in
it is. XLA_FLAGS count, and no command's own flags are set. --apart gives the program every layer's weights in arrays of
their own and writes the layers out, where the network has a stack and a scan. Needs nothing beside rcm_jax.
"""

import argparse
import collections
import dataclasses
import json
import re
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.types import Params
from rcm_jax.wan.config import REMAT, DiTConfig
from rcm_jax.wan.dit import DiT
from tests import benchmarks
from tests.tiny import perturbed_params

MODEL = DiTConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=30, text_dim=256, text_len=32)
LATENT = (4, 16, 16)  # 256 tokens of (1, 2, 2)
KINDS = {  # what an operation holds, in HLO; the first that it holds names it
    "products of attention": r"\bdot\(.*lhs_batch_dims",
    "products": r"\bdot\(",
    "sums": r"\breduce\(",
    "writing stacks": r"\bdynamic-update-slice\(",
    "reading stacks": r"\bdynamic-slice\(",
    "copies": r"\b(copy|concatenate|transpose)\(",
}


def apart(params: Params) -> tuple[Params, list[Params]]:
    """The weights outside the blocks, and those of each block."""
    count = len(jax.tree.leaves(params["blocks"])[0])
    layers = [jax.tree.map(lambda w, i=i: w[i], params["blocks"]) for i in range(count)]
    return {name: value for name, value in params.items() if name != "blocks"}, layers


def together(rest: Params, layers: list[Params]) -> Params:
    """The network's parameters again. In a program that writes all layers out XLA sees that no stack is needed."""
    return rest | {"blocks": jax.tree.map(lambda *w: jnp.stack(w), *layers)}


def gradient(remat: str, written_out: bool) -> tuple[jax.stages.Lowered, Any]:
    """The lowered gradient of all parameters, and its argument. written_out: with the layers' weights `apart`."""
    config = dataclasses.replace(MODEL, remat=remat, unroll=MODEL.num_layers if written_out else 1)
    rng = np.random.default_rng(0)
    x, dv = (jnp.asarray(rng.normal(size=(1, *LATENT, 16)), jnp.float32) for _ in range(2))
    text = jnp.asarray(rng.normal(size=(1, config.text_len, config.text_dim)), jnp.float32)

    def loss(weights):
        params = together(*weights) if written_out else weights
        return (DiT(config).apply({"params": params}, x, jnp.array([700.0]), text) * dv).sum()

    params = jax.tree.map(jnp.asarray, perturbed_params(config, scale=0.02))
    weights = apart(params) if written_out else params
    return jax.jit(jax.grad(loss)).lower(weights), weights


def bodies(program: str) -> dict[str, str]:
    """Of every operation of a compiled program: its line, and the computation that it calls if it is a fusion."""
    computations = {m[1]: m[2] for m in re.finditer(r"^%([\w.-]+) \([^\n]*\{\n(.*?)^\}", program, re.M | re.S)}
    found = {}
    for m in re.finditer(r"^\s*(?:ROOT )?%([\w.-]+) = (.*)$", program, re.M):
        called = re.search(r"calls=%([\w.-]+)", m[2])
        found[m[1]] = m[2] + "\n" + (computations.get(called[1], "") if called else "")
    return found


def kind(body: str) -> str:
    return next((name for name, pattern in KINDS.items() if re.search(pattern, body)), "element-wise")


def profile(call, program: str) -> dict[str, float]:
    """Seconds of one call's operations by their kind, over all threads; not of loops and calls, which hold others."""
    seconds, body = collections.Counter(), bodies(program)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    for event in (event for plane in data.planes for line in plane.lines for event in line.events):
        name = dict(event.stats).get("hlo_op")
        if name in body and not re.match(r"\S+ (while|call|conditional)\(", body[name]):
            seconds[kind(body[name])] += event.duration_ns / 1e9
    return dict(seconds.most_common())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--remat", choices=REMAT, default="dots")
    p.add_argument("--apart", action="store_true", help="layers written out, their weights in arrays of their own")
    p.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    args = p.parse_args()
    lowered, weights = gradient(args.remat, args.apart)
    began = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = round(time.perf_counter() - began, 1)

    def call():
        jax.block_until_ready(compiled(weights))

    call()
    times, faults = [], []
    for _ in range(5):
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        times.append(time.perf_counter() - began)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    seconds = profile(call, compiled.as_text())
    result = benchmarks.machine("jax") | {
        "remat": args.remat, "apart": args.apart, "ms": round(1e3 * statistics.median(times)),
        "compile_seconds": compile_seconds, "pages": int(statistics.median(faults)),
        "temporaries_mib": compiled.memory_analysis().temp_size_in_bytes >> 20, "seconds": seconds,
    }  # fmt: skip
    print(json.dumps({name: value for name, value in result.items() if name != "seconds"}))
    total = sum(seconds.values())
    for name, value in seconds.items():
        print(f"{name:24} {1e3 * value:8.1f} ms {value / total:6.1%}")
    benchmarks.write_json(args.json, result)


if __name__ == "__main__":
    main()
