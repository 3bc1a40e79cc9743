"""Two choices of the causal code, measured: python -m tests.benchmarks.causal_forms [--frames 9 21]

The rollout as a scan over chunks on one full cache, against the same chunks unrolled on caches as long as they need to
be (a growing prefix), and against scans in buckets, whose caches grow a few chunks at a time: seconds to compile and to
run. And the backward pass of a self-forced rollout, plain and replayed: temporary memory as the chunks grow.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkPattern
from rcm_jax.sampling.rollout import Branch, chunk_noises, open_branches, sample_chunk
from rcm_jax.sampling.schedules import few_step_schedule
from rcm_jax.sampling.self_rollout import self_rollout
from rcm_jax.types import Latents, Params
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.dit import DiT
from tests import benchmarks
from tests.tiny import perturbed_params

MODEL = DiTConfig(
    dim=128, ffn_dim=512, num_heads=4, num_layers=4, freq_dim=128, text_dim=64, text_len=16, remat="none"
)  # fmt: skip
SIZE = (16, 16)  # 64 tokens a latent frame
SCHEDULE = few_step_schedule([2])
TEXT = jax.random.normal(jax.random.key(3), (1, 16, MODEL.text_dim))
NOISES = chunk_noises(0, jnp.arange(1), 3, (*SIZE, MODEL.in_channels))


def network(frames: int) -> CausalDiT:
    return CausalDiT(DiT(MODEL), ChunkPattern(1, 1), frames, SIZE)


def longer(branch: Branch, frames: int) -> Branch:
    """The branch with room for so many latent frames."""
    short = network(frames).capacity - branch.cache.k.shape[2]
    pad = [(0, 0), (0, 0), (0, short), (0, 0), (0, 0)]
    return Branch(branch.prompt, jax.tree.map(lambda x: jnp.pad(x, pad), branch.cache))


def in_buckets(frames: int, bucket: int) -> Callable[[Params], Latents]:
    """The rollout in scans of `bucket` chunks, each on a cache that ends with it; a bucket of one chunk is a call."""

    def run(params: Params) -> Latents:
        branches, parts = open_branches(network(min(bucket, frames)), params, TEXT, None, SCHEDULE), []
        for start in range(0, frames, bucket):
            end = min(start + bucket, frames)
            causal, branches = network(end), tuple(longer(b, end) for b in branches)

            def body(branches, chunk, causal=causal):
                times, _ = SCHEDULE.chunk(0)
                x, branches = sample_chunk(causal, params, branches, chunk, NOISES(chunk, 1), times)
                return branches, x

            if end == start + 1:
                branches, x = body(branches, start)
                parts.append(x)
            else:
                branches, chunks = jax.lax.scan(body, branches, jnp.arange(start, end))
                parts.append(jnp.moveaxis(chunks[:, :, 0], 0, 1))
        return jnp.concatenate(parts, axis=1)

    return run


def rollouts(frames: int, rounds: int) -> list[dict]:
    params = perturbed_params(MODEL, scale=0.02)
    forms = {"scan": frames, "buckets of 4": 4, "growing prefix": 1}
    programs, compiled, results = {}, {}, []
    for name, bucket in forms.items():
        lowered = jax.jit(in_buckets(frames, bucket)).lower(params)
        start = time.perf_counter()
        program = lowered.compile()
        compiled[name] = time.perf_counter() - start
        programs[name] = lambda program=program: jax.block_until_ready(program(params))
    want = programs["scan"]()
    seconds = benchmarks.time_in_turn(programs, rounds, 1)
    for name, program in programs.items():
        error = benchmarks.relative(program(), want)
        if not error < 1e-4:
            raise AssertionError(f"{name} differs from the scan by {error:.1e}")
        run = benchmarks.ratio(seconds[name], seconds["scan"])
        results.append({"frames": frames, "form": name, "compile": compiled[name], "seconds": seconds[name]})
        print(f"{frames:6d}  {name:15s} {compiled[name]:8.1f} {statistics.median(seconds[name]):8.2f}   "
              f"{benchmarks.spread(run)}", flush=True)  # fmt: skip
    return results


def memory(frames: int, replay: bool) -> int:
    """Bytes of temporaries of the gradient of a rollout, by the compiler."""
    causal = dataclasses.replace(network(frames), dit=DiT(dataclasses.replace(MODEL, remat="attention")))

    def loss(params: Params) -> jax.Array:
        schedule = few_step_schedule([2], sigma_max=float("inf"))
        video, _ = self_rollout(causal, params, TEXT, NOISES, schedule, jnp.int32(2), frames=frames, replay=replay)
        return jnp.square(video).sum()

    params = perturbed_params(MODEL, scale=0.02)
    return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[9, 21], help="latent frames of the rollouts")
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 8, 16, 32], help="of the self-forced rollouts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    args = parser.parse_args()
    where = benchmarks.machine("jax", "jaxlib", "flax")
    print(", ".join(f"{k} {v}" for k, v in where.items()) + ", float32")
    print("frames  rollout         compile s    run s   run / scan")
    forms = [r for frames in args.frames for r in rollouts(frames, args.rounds)]
    print("\nchunks  plain MiB  replayed MiB")
    sizes = []
    for chunks in args.chunks:
        sizes.append({"chunks": chunks, "plain": memory(chunks, False), "replayed": memory(chunks, True)})
        print(f"{chunks:6d} {sizes[-1]['plain'] / 2**20:10.1f} {sizes[-1]['replayed'] / 2**20:13.1f}", flush=True)
    benchmarks.write_json(args.json, {"machine": where, "rollouts": forms, "memory": sizes})


if __name__ == "__main__":
    main()
