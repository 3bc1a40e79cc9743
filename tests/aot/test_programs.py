"""The parts that are not a training step compile for a GPU that is not here: every kernel, a chunk of a stream."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rcm_jax.aot.compile import absent, compile_for
from rcm_jax.aot.gpus import find_gpu
from rcm_jax.aot.hlo import read
from rcm_jax.aot.report import report
from rcm_jax.aot.traffic import moved_bytes, moves
from rcm_jax.kernels import pallas_triton
from rcm_jax.kernels.bench_shapes import packed
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.objectives.config import CausalConfig
from rcm_jax.parallel import make_mesh, sharded_attention
from rcm_jax.sampling.schedules import few_step_schedule
from rcm_jax.sampling.stream import open_caches, sample_step
from rcm_jax.wan import vae_layers
from rcm_jax.wan.config import WAN_1_3B, VAEConfig
from rcm_jax.wan.dit import DiT
from rcm_jax.wan.networks import abstract_network
from rcm_jax.wan.vae import VAE
from rcm_jax.worlds.painted import paint
from rcm_jax.worlds.wan.world import decode_step, decoder_dtype
from tests.benchmarks.chunk_program import compiled

pytestmark = [pytest.mark.aot, pytest.mark.optimised]

S, N, D = 3120, 12, 128
MASKS = {"none": None, "kv_len": KeyRuns(kv_len=1000), "runs": packed("c1-1", 2, S // 4)}
SCALE = D**-0.5
CALLS = {
    "forward": lambda q, lse, mask: pallas_triton.forward(q, q, q, mask, SCALE),
    "tangent": lambda q, lse, mask: pallas_triton.tangent(q, q, q, q, lse, q, q, q, mask, SCALE),
    "fused": lambda q, lse, mask: pallas_triton.fused(q, q, q, q, q, q, mask, SCALE),
    "backward": lambda q, lse, mask: pallas_triton.backward(q, q, q, q, lse, q, mask, SCALE),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=absent("h100", 1))


def shaped(mesh, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", CALLS)
def test_kernel(mesh, kind, mask):
    q, lse = shaped(mesh, (1, S, N, D), jnp.bfloat16), shaped(mesh, (1, N, S), jnp.float32)
    with jax.set_mesh(mesh):
        program = compile_for(lambda q, lse: CALLS[kind](q, lse, MASKS[mask]), q, lse)
    told = report(kind, program, mesh, find_gpu("h100"))
    assert told.kernels == ({"dq": 1, "dkv": 1} if kind == "backward" else {kind: 1})
    products = {"forward": 2, "tangent": 5, "fused": 6, "backward": 7}[kind]
    pairs = sum(n * k for n, k in ((780, 780), (780, 1560), (780, 780), (780, 1560))) if mask == "runs" else S * S
    assert told.flops == pytest.approx(2 * N * D * products * pairs, rel=1e-6)
    assert told.temporaries < 64 * 2**20  # nothing as large as the scores


def test_a_chunk_of_a_stream(mesh):
    """Of the 1.3B at 480p, two layers deep: our kernel, and the caches in place."""
    gpu, frames, latents = find_gpu("h100"), 21, (60, 104)
    config = dataclasses.replace(WAN_1_3B, num_layers=2)
    dit = DiT(config, sharded_attention(mesh))
    network = CausalConfig(pattern="c3-3").network(dit, (frames, *latents))
    schedule = few_step_schedule([4, 2])
    params, text = abstract_network(config), jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32)
    prompts, caches = jax.eval_shape(lambda p, t: open_caches(network, p, t, None, schedule), params, text)
    times, noisy = schedule.chunk(1)
    noises = jax.ShapeDtypeStruct((len(times), 1, 3, *latents, 16), jnp.float32)
    placed = jax.tree.map(
        lambda x: shaped(mesh, x.shape, x.dtype), (params, prompts, caches, jax.ShapeDtypeStruct((), jnp.int32), noises)
    )
    with jax.set_mesh(mesh):
        program = compile_for(sample_step, network, *placed, times=times, noisy_context=noisy, ode=False, guidance=1.0)
    told = report("chunk", program, mesh, gpu)
    assert set(told.kernels) == {"forward"}
    cache = 2 * 2 * frames * 30 * 52 * 1536 * 2  # keys and values, two layers
    assert told.outputs < cache / 4  # not copied: the chunk's latents alone are new
    of_cache = [move for move in moves(read(program.hlo)) if f",{frames * 30 * 52}," in move.shape]
    assert of_cache, "the chunk's own keys are written, so this finds what is moved"
    assert sum(move.bytes for move in of_cache) <= cache / frames * 3  # and nothing else of it is
    assert told.fits


@pytest.mark.parametrize(("preset", "share"), [("4step", 1.0), ("2step_noisy_ctx", 1.5)])
def test_a_student_copies_no_weights(preset, share):
    """Of the same in small chunks: all that is copied, in units of its own keys; a weight is half of one."""
    _, module = compiled("h100", "c1-1", preset, 21, (60, 104), layers=2, unroll=2)
    assert 0 < moved_bytes(module) <= share * (2 * 2 * 2 * 1560 * WAN_1_3B.dim)


def test_the_gradient_of_a_chunk_on_its_cache(mesh):
    """What self forcing runs again: the past gives to the gradient of the queries, and gets none for its keys."""
    config = dataclasses.replace(WAN_1_3B, num_layers=2, remat="none")
    network = CausalConfig(pattern="c3-3").network(DiT(config, sharded_attention(mesh)), (21, 16, 16))
    x = jax.ShapeDtypeStruct((1, 3, 16, 16, 16), jnp.float32)
    params, text = abstract_network(config), jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32)
    prompt, cache = jax.eval_shape(lambda p, t: (network.prompt(p, t), network.init_cache(1)), params, text)
    given = params, x, prompt, cache, jax.ShapeDtypeStruct((), jnp.int32)
    placed = jax.tree.map(lambda x: shaped(mesh, x.shape, x.dtype), given)

    def loss(params, x, prompt, cache, chunk):
        return jnp.square(network.denoise(params, x, jnp.full(1, 0.5), prompt, cache, chunk)).sum()

    with jax.set_mesh(mesh):
        told = report("chunk", compile_for(jax.grad(loss, argnums=(0, 2)), *placed), mesh, find_gpu("h100"))
    past, own, text = 2, 2, 2  # a layer each
    assert told.kernels == {"forward": past + own + text, "dq": past + own + text, "dkv": own + text}


def decoding(mesh):
    """A step of a small decoder's stream."""
    params, latents = abstract_network(VAEConfig(dim=8)), jax.ShapeDtypeStruct((1, 1, 8, 8, 16), jnp.float32)
    with jax.set_mesh(mesh):
        vae = VAE(VAEConfig(dim=8, dtype=decoder_dtype()))
        state = jax.eval_shape(vae.decode_chunk, params, latents)[1]
        placed = jax.tree.map(lambda x: shaped(mesh, x.shape, x.dtype), (params, latents, state))
        return compile_for(decode_step, vae, *placed, paint)


def test_a_step_of_the_decoder(mesh, monkeypatch):
    """In bfloat16, one convolution for three planes, bytes as frames; and what it computes is counted."""
    program = decoding(mesh)
    monkeypatch.setattr(vae_layers, "convolve", vae_layers.planes)
    jax.clear_caches()  # traces are kept
    apart = decoding(mesh)
    jax.clear_caches()
    sizes, sizes_apart = (
        Counter(re.findall(r"window=\{size=([0-9x]+).*__cudnn\$conv", hlo)) for hlo in (program.hlo, apart.hlo)
    )
    assert sizes == {"3x3x3": 30, "3x1x1": 2, "3x3": 3}
    assert "3x3x3" not in sizes_apart
    assert sizes_apart["3x3"] > 80
    assert re.search(r"bf16\[[0-9,]+\]\S*, u8\[0\]\S*\) custom-call.*size=3x3x3", program.hlo)
    assert "u8[1,4,64,64,3]" in program.hlo
    one, three = (report("decoder", p, mesh, find_gpu("h100")) for p in (program, apart))
    assert one.flops == pytest.approx(three.flops, rel=0.1)  # cuDNN's channels are padded
    assert one.flops > 30 * 2 * 9 * 8 * 8 * 64 * 64
    assert one.temporaries < three.temporaries
