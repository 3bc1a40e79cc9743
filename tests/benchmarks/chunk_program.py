"""What a chunk of a stream is, compiled for a GPU that is not here: bytes copied, memory, launches, and its floor.

    python -m tests.benchmarks.chunk_program --patterns c1-1 c3-3 --presets 4step 2step 2step_noisy_ctx 1step
    python -m tests.benchmarks.chunk_program --patterns c1-1 --presets 2step --unroll 1 --largest 12
    python -m tests.benchmarks.chunk_program --depths 2 4      # minutes instead of an hour: in line with two depths

Of the 1.3B at 480p, a chunk after the first, 21 latent frames in the cache. The floor is what it must take: for each
pass the weights and the past, read once, at nine tenths of the memory's rate (3.0 TB/s of an H100, 4.3 of an H200), or
its FLOPs at 60% of the rate of bfloat16 products, if that is more. Frames a second follow from these and the decoder's
FLOPs (`decoder_programs`: 13.3 and 0.5 TFLOP a latent frame) at the same rate. Compiled, not run.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rcm_jax.aot.compile import absent, compile_for, no_gpus
from rcm_jax.aot.costs import RATES
from rcm_jax.aot.gpus import find_gpu
from rcm_jax.aot.hlo import read
from rcm_jax.aot.report import report
from rcm_jax.aot.traffic import launches, moved_bytes, moves
from rcm_jax.chunks import ChunkPattern
from rcm_jax.objectives.config import CausalConfig
from rcm_jax.parallel import make_mesh, sharded_attention
from rcm_jax.sampling.schedules import few_step_schedule
from rcm_jax.sampling.stream import open_caches, sample_step
from rcm_jax.wan.config import WAN_1_3B
from rcm_jax.wan.dit import DiT
from rcm_jax.wan.networks import abstract_network

PRESETS = {  # of the chunks after the first: steps, and whether the last of them fills the cache
    "4step": (4, False), "2step": (2, False), "2step_noisy_ctx": (2, True), "1step": (1, False),
}  # fmt: skip
DECODERS = {"full": 13.3e12, "tiny": 0.5e12}  # FLOPs a latent frame
PRODUCTS, MEMORY = 0.6, 0.9  # of the GPU's rates


def compiled(gpu, pattern, preset, frames, latents, layers, unroll, dtype="bfloat16", **causal):
    """(report, module) of a chunk after the first."""
    mesh = make_mesh(devices=absent(gpu, 1))
    config = dataclasses.replace(WAN_1_3B, num_layers=layers, unroll=unroll)
    network = CausalConfig(pattern=pattern, **causal).network(DiT(config, sharded_attention(mesh)), (frames, *latents))
    steps, noisy = PRESETS[preset]
    schedule = few_step_schedule([steps], noisy_context_from=0 if noisy else None)
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


def floors(gpu, pattern, preset, flops, frames, layers):
    """Least seconds of the network's part of a chunk, and frames a second with each decoder."""
    rates, config = RATES[gpu], dataclasses.replace(WAN_1_3B, num_layers=layers)
    steps, noisy = PRESETS[preset]
    passes, chunk = steps + (not noisy), ChunkPattern.parse(pattern).rest
    weights = 2 * sum(x.size for x in jax.tree.leaves(abstract_network(config)["blocks"]))
    past = 2 * 2 * layers * (frames - chunk) * 1560 * config.dim
    one = max((weights + past) / (MEMORY * rates.memory), flops / passes / (PRODUCTS * rates.products))
    decoded = {name: chunk * count / (PRODUCTS * rates.products) for name, count in DECODERS.items()}
    return passes * one, {name: 4 * chunk / (passes * one + seconds) for name, seconds in decoded.items()}


def in_line(depths, values, layers):
    """Numbers for so many layers, on the line through those of two depths; those of one are what they are."""
    if len(depths) == 1:
        return values[0]
    (a, b), (one, other) = depths, values
    return [x + (y - x) * (layers - a) / (b - a) for x, y in zip(one, other, strict=True)]


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=["c1-1", "c3-3"])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--frames", type=int, default=21, help="latent frames of the cache")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--depths", type=int, nargs=2, metavar="N", help="compile these, and extend to --layers")
    parser.add_argument("--unroll", type=int, help="layers that are written out (default: all)")
    parser.add_argument("--largest", type=int, default=0, help="moves to print")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    given = parser.parse_args(args)
    no_gpus()
    depths = given.depths or [given.layers]
    if (given.unroll and given.depths) or len(set(depths)) != len(depths):
        parser.error("--depths are two numbers of layers, all of them written out")
    rows = []
    head = "chunks", "preset", "TFLOP", "copied MB", "own keys MB", "launches", "peak GiB", "compiled in s"
    print(f"| {' | '.join((*head, 'H100: floor ms; frames/s full, tiny', 'H200'))} |\n{'|---' * 10}|")
    for pattern, preset in itertools.product(given.patterns, given.presets):
        found = []
        for layers in depths:
            told, module = compiled(
                "h100", pattern, preset, given.frames, (60, 104), layers, given.unroll or layers
            )  # fmt: skip
            found.append({
                "flops": told.flops, "moved": moved_bytes(module), "launches": launches(module), "peak": told.peak,
                "arguments": told.arguments, "temporaries": told.temporaries, "seconds": told.compile_seconds,
            })  # fmt: skip
        row = dict(zip(found[0], in_line(depths, [list(one.values()) for one in found], given.layers), strict=True))
        own = 2 * 2 * given.layers * ChunkPattern.parse(pattern).rest * 1560 * WAN_1_3B.dim
        floor = {
            gpu: floors(gpu, pattern, preset, row["flops"], given.frames, given.layers) for gpu in ("h100", "h200")
        }
        about = {"pattern": pattern, "preset": preset, "layers": given.layers, "depths": depths, "unroll": given.unroll}
        rows.append(about | row | {"own": own, "floor": floor})
        cells = [f"{1e3 * seconds:.1f}, {rate['full']:.0f}, {rate['tiny']:.0f}" for seconds, rate in floor.values()]
        print(
            f"| {pattern} | {preset} | {row['flops'] / 1e12:.1f} | {row['moved'] / 1e6:.0f} | {own / 1e6:.0f} | "
            f"{row['launches']:.0f} | {row['peak'] / 2**30:.2f} | {row['seconds']:.0f} | {' | '.join(cells)} |",
            flush=True,
        )  # fmt: skip
        for move in moves(module)[: given.largest]:
            print(f"  {move.bytes / 2**20:10.1f} MiB  {move.times:4d} x {move.shape[:60]:60s} {move.where[-90:]}")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
