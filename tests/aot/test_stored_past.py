"""A chunk of a stream whose past is stored before RoPE, or in few bytes: no layer of it is made in memory."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rcm_jax.aot import sass
from rcm_jax.aot.compile import absent, compile_for
from rcm_jax.aot.gpus import find_gpu
from rcm_jax.aot.hlo import read
from rcm_jax.aot.report import report
from rcm_jax.causal.cache import Ring
from rcm_jax.causal.policies import policy_of
from rcm_jax.causal.quantised import quantised
from rcm_jax.kernels import attention as op
from rcm_jax.kernels import pallas_triton
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.past import Past
from rcm_jax.objectives.config import CausalConfig
from rcm_jax.parallel import make_mesh, sharded_attention
from rcm_jax.quant import CacheQuant, QuantConfig, laid_by_token, store
from rcm_jax.wan.config import WAN_1_3B
from rcm_jax.wan.dit import DiT
from rcm_jax.wan.networks import abstract_network

pytestmark = [pytest.mark.aot, pytest.mark.optimised]

FRAME, LAYERS, HEADS, WIDTH = 1560, 2, 12, 128


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=absent("h100", 1))


def shaped(mesh, tree):
    place = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def by(granularity, dtype):
    return QuantConfig(dtype, granularity=granularity)


LAYER = 18 * FRAME * HEADS * WIDTH  # numbers of a layer's keys: what the policies' slots hold
VIEWS = ("parameter", "bitcast", "get-tuple-element", "tuple", "while")


POLICIES = {
    "before RoPE": policy_of("infinity_rope", cache_blocks=6, sink_blocks=1),
    "int8": quantised(Ring(window=7), CacheQuant(QuantConfig("int8"), QuantConfig("int8"))),
    "int8, keys by token": quantised(Ring(window=7), CacheQuant(by("token", "int8"), QuantConfig("int8"))),
    "int4, in another order": quantised(
        policy_of("infinity_rope", cache_blocks=6, sink_blocks=1), CacheQuant(QuantConfig("int4"), QuantConfig("int4"))
    ),
}


def made_of_the_past(mesh, name):
    """Arrays as large as a layer's keys that a chunk of the 1.3B at 480p, two layers deep, makes in memory."""
    frames, latents = 21, (60, 104)
    config = dataclasses.replace(WAN_1_3B, num_layers=LAYERS)
    network = CausalConfig(pattern="c3-3").network(DiT(config, sharded_attention(mesh)), (frames, *latents))
    network = dataclasses.replace(network, policy=POLICIES[name])
    params, text = abstract_network(config), jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32)
    x = jax.ShapeDtypeStruct((1, 3, *latents, 16), jnp.float32)
    prompt, cache = jax.eval_shape(lambda p, text: (network.prompt(p, text), network.init_cache(1)), params, text)
    t, chunk = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    with jax.set_mesh(mesh):
        program = compile_for(network.denoise, *shaped(mesh, (params, x, t, prompt, cache, chunk)))
    assert set(report("chunk", program, mesh, find_gpu("h100")).kernels) == {"forward"}
    steps = (i for _, i, _ in read(program.hlo).scheduled() if i.opcode not in VIEWS)
    return [array for i in steps for array in i.arrays if math.prod(array[1]) >= LAYER]


@pytest.mark.parametrize("name", POLICIES)
def test_a_chunk_makes_no_layer_of_its_past(mesh, name):
    assert not made_of_the_past(mesh, name)


@pytest.mark.parametrize("name", POLICIES)
def test_a_layer_that_is_made_is_found(mesh, monkeypatch, name):
    monkeypatch.setattr(op, "not_read", lambda *_: "it is not asked to")
    jax.clear_caches()  # traces are kept
    assert made_of_the_past(mesh, name)
    jax.clear_caches()


STORED = [("bf16", "token"), *itertools.product(("int8", "fp8", "int4", "fp4", "int2"), ("token", "channel"))]


@pytest.mark.parametrize(("dtype", "granularity"), STORED)
def test_the_kernel_of_stored_keys(mesh, dtype, granularity):
    """It needs no memory for the past, and spills next to nothing in its loop. Values have scales of a token."""
    chunk = jax.ShapeDtypeStruct((1, FRAME, HEADS, WIDTH), jnp.bfloat16)

    def stack(config):
        one = jax.eval_shape(lambda x: laid_by_token(store(x, config)[0]), chunk)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((LAYERS, 21, *x.shape), x.dtype), one)

    table = jax.ShapeDtypeStruct((21 * FRAME, WIDTH // 2), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    past = Past(stack(by(granularity, dtype)), stack(by("token", dtype)), None, scalar, (table, table))

    def call(q, past, kv_len):
        return pallas_triton.forward_of_past(q, past, KeyRuns(kv_len=kv_len), 0.1, parts=1)

    with jax.set_mesh(mesh):
        program = compile_for(call, *shaped(mesh, (chunk, past, scalar)))
    kernel = sass.assemble(program.ptx["attention_forward"], "attention_forward")
    assert kernel.main_loop.spilled <= 16
    assert {name for name in kernel.main_loop.products if name.startswith("HGMMA")}
    assert program.temporaries <= 21 * FRAME * WIDTH * 2  # the narrow tables of RoPE, as large as one head's keys
    assert not re.search(rf"bf16\[[0-9,]*{21 * FRAME},{HEADS},{WIDTH}\]", program.hlo) or dtype == "bf16"
