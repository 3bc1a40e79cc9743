"""What a chunk of a stream is, compiled for a GPU that need not be here: bytes copied, memory, launches, and its floor.

    python -m tests.benchmarks.chunk_program --gpu h100 --patterns c1-1 c3-3 --steps 2

The floor is what it must take: its bytes (weights of every pass, the past that is seen, once) at 4.3 TB/s on an H200 or
3.0 on an H100, nine tenths of their memory's rate, or its FLOPs at 60% of the rate of bfloat16 products, whichever is
more, pass by pass. Compiled, not run.
"""

import argparse
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rcm_jax.aot.compile import absent, compile_for, no_gpus
from rcm_jax.aot.gpus import find_gpu
from rcm_jax.aot.hlo import read
from rcm_jax.aot.report import report
from rcm_jax.aot.traffic import launches, moved_bytes, moves
from rcm_jax.objectives.config import CausalConfig
from rcm_jax.parallel import make_mesh, sharded_attention
from rcm_jax.sampling.schedules import few_step_schedule
from rcm_jax.sampling.stream import open_caches, sample_step
from rcm_jax.wan.config import WAN_1_3B
from rcm_jax.wan.dit import DiT
from rcm_jax.wan.networks import abstract_network


def compiled(gpu, pattern, steps, frames, latents, layers, unroll=1, dtype="bfloat16", **causal):
    """(report, module) of a chunk after the first."""
    mesh = make_mesh(devices=absent(gpu, 1))
    config = dataclasses.replace(WAN_1_3B, num_layers=layers, unroll=unroll)
    network = CausalConfig(pattern=pattern, **causal).network(DiT(config, sharded_attention(mesh)), (frames, *latents))
    schedule = few_step_schedule([steps])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_network(config))
    text = jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32)
    times, noisy = schedule.chunk(1)
    noises = jax.ShapeDtypeStruct((len(times), 1, network.pattern.rest, *latents, 16), jnp.float32)
    with jax.set_mesh(mesh):
        prompts, caches = jax.eval_shape(lambda p, t: open_caches(network, p, t, None, schedule), params, text)
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))  # noqa: E731
        placed = jax.tree.map(place, (params, prompts, caches, jax.ShapeDtypeStruct((), jnp.int32), noises))
        program = compile_for(sample_step, network, *placed, times=times, noisy_context=noisy, ode=False, guidance=1.0)
    return report("chunk", program, mesh, find_gpu(gpu)), read(program.hlo)


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--patterns", nargs="+", default=["c1-1", "c3-3"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--unroll", type=int, default=1, help="layers of the loop over them that are written out")
    parser.add_argument("--largest", type=int, default=12, help="moves to print")
    given = parser.parse_args(args)
    no_gpus()
    for pattern in given.patterns:
        told, module = compiled(given.gpu, pattern, given.steps, given.frames, (60, 104), given.layers, given.unroll)
        row = {
            "pattern": pattern, "gpu": given.gpu, "steps": given.steps, "layers": given.layers,
            "peak": told.peak, "arguments": told.arguments, "temporaries": told.temporaries, "flops": told.flops,
            "moved": moved_bytes(module), "launches": launches(module), "kernels": told.kernels,
            "compile_seconds": told.compile_seconds,
        }  # fmt: skip
        print(json.dumps(row))
        for move in moves(module)[: given.largest]:
            print(f"  {move.bytes / 2**20:10.1f} MiB  {move.times:4d} x {move.shape[:60]:60s} {move.where[-90:]}")


if __name__ == "__main__":
    main(sys.argv[1:])
