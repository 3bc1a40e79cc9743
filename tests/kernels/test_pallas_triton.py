"""The Pallas kernels, interpreted, against the reference; and that they lower for CUDA."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir  # to read the IR inside the lowered call: there is no public way
from jax._src.lib import triton as jax_triton
from jax._src.lib.mlir import ir

from rcm_jax.aot import sass
from rcm_jax.aot.compile import absent
from rcm_jax.kernels import pallas_triton, reference, xla
from rcm_jax.kernels.attention import attention
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.pallas_parts import parts_for
from rcm_jax.kernels.pallas_triton import AUTO_MAX_WIDTH
from rcm_jax.kernels.tiles import KINDS, Tiles
from tests.benchmarks import abstract_gpu, kernel_tiles

SMALL = Tiles(16, 32)


BLOCKS_CAUSAL = KeyRuns((15, 30, 45), (((0, 15),), ((0, 30),), ((0, 45),)))
# clean frames see clean ones up to their own; noisy frames see clean ones before their own, and themselves
TEACHER_FORCING = KeyRuns(
    (20, 40, 60, 80), (((0, 20),), ((0, 40),), ((40, 60),), ((0, 20), (60, 80)))
)  # fmt: skip
WINDOW_AND_SINK = KeyRuns((30, 60, 90), (((0, 30),), ((0, 60),), ((0, 8), (40, 90))))
BLIND_ROWS = KeyRuns((7, 40, 50), (((3, 20),), (), ((0, 1), (30, 31), (45, 50))))

CASES = {  # queries, keys, width of q and k, width of v, mask
    "one tile": (16, 32, 16, 16, None),
    "tiles that divide": (32, 64, 32, 32, None),
    "odd lengths": (51, 99, 64, 64, None),
    "short": (15, 15, 128, 128, None),
    "widths 24 and 96": (40, 33, 24, 96, None),
    "width 256": (17, 33, 256, 16, None),
    "more keys than queries": (9, 130, 32, 32, None),
    "widths 3 and 12": (20, 40, 3, 12, None),
    "one query": (1, 70, 32, 32, None),
    "block-causal": (45, 45, 32, 32, BLOCKS_CAUSAL),
    "teacher forcing": (80, 80, 32, 32, TEACHER_FORCING),
    "window and sink": (90, 90, 32, 32, WINDOW_AND_SINK),
    "rows without keys": (50, 50, 32, 16, BLIND_ROWS),
    "rows without keys, kv_len": (50, 50, 32, 16, KeyRuns(BLIND_ROWS.query_ends, BLIND_ROWS.runs, kv_len=17)),
    "no row sees a key": (20, 30, 32, 32, KeyRuns((5, 20), ((), ()))),
    "teacher forcing, kv_len": (80, 80, 32, 32, KeyRuns(TEACHER_FORCING.query_ends, TEACHER_FORCING.runs, kv_len=64)),
    "cache": (12, 100, 32, 32, KeyRuns(kv_len=37)),
    "cache that ends with a tile": (12, 100, 32, 32, KeyRuns(kv_len=64)),
    "empty cache": (12, 100, 32, 32, KeyRuns(kv_len=0)),
    "full cache": (12, 100, 32, 32, KeyRuns(kv_len=100)),
}


def operands(S, K, D, V, dtype=jnp.float32, B=2, N=2, seed=0):
    """q, k, v, tq, tk, tv, do."""
    rng = np.random.default_rng(seed)
    shapes = [(B, S, N, D), (B, K, N, D), (B, K, N, V)] * 2 + [(B, S, N, V)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def results(forward, tangent, backward, arrays, mask):
    """o, lse, to, to along each of q, k, v alone, dq, dk, dv; kv_len traced."""

    @jax.jit
    def run(arrays, mask):
        *x, tq, tk, tv, do = arrays
        scale = x[0].shape[-1] ** -0.5
        o, lse = forward(*x, mask, scale)
        alone = [tangent(*x, o, lse, *t, mask, scale) for t in ((tq, None, None), (None, tk, None), (None, None, tv))]
        to = tangent(*x, o, lse, tq, tk, tv, mask, scale)
        return {"o": o, "lse": lse, "to": to, "alone": alone, "grads": backward(*x, o, lse, do, mask, scale)}

    return run(arrays, mask)


def pallas(arrays, mask, tiles=SMALL):
    functions = (pallas_triton.forward, pallas_triton.tangent, pallas_triton.backward)
    return results(*(functools.partial(f, tiles=tiles) for f in functions), arrays, mask)


def expected(arrays, mask):
    return results(reference.forward, reference.tangent, reference.backward, arrays, mask)


def close(got, want, tolerance=3e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(np.where(np.isinf(b), 0, b)).max()))


QUICK = ("odd lengths", "rows without keys, kv_len", "teacher forcing", "cache")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.long) for c in CASES])
def test_kernels_against_the_reference(case):
    *sizes, mask = CASES[case]
    arrays = operands(*sizes)
    want = expected(arrays, mask)
    close(pallas(arrays, mask), want)
    fused = jax.jit(functools.partial(pallas_triton.fused, scale=sizes[2] ** -0.5, tiles=SMALL))
    close(fused(*arrays[:6], mask), (want["o"], want["lse"], want["to"]))


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(scale):
    """The largest score is then not that of the largest product."""
    *x, tq, tk, tv, _ = operands(20, 40, 16, 16, B=1)
    o, lse = reference.forward(*x, None, scale)
    want = o, lse, reference.tangent(*x, o, lse, tq, tk, tv, None, scale)
    close(pallas_triton.fused(*x, tq, tk, tv, None, scale, tiles=Tiles(16, 16)), want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_accuracy_in_half_precision(dtype):
    """No worse than twice the error of the same sums by XLA with float32 accumulation."""
    arrays = operands(70, 90, 64, 64, dtype)
    with jax.enable_x64(True):
        exact = jax.device_get(expected([x.astype(jnp.float64) for x in arrays], None))
    by_xla, got = results(xla.forward, xla.tangent, xla.backward, arrays, None), pallas(arrays, None)
    for a, b, e in zip(*map(jax.tree.leaves, (got, by_xla, exact)), strict=True):
        error, allowed = (np.sqrt(np.mean((np.asarray(x, np.float64) - e) ** 2)) for x in (a, b))
        assert error <= 2 * allowed + 1e-7


@pytest.mark.parametrize("mask", [None, TEACHER_FORCING], ids=["dense", "teacher forcing"])
def test_one_pass_through_the_op(mask):
    """The gradient of a loss that holds a jvp, from split kernels and from the fused one."""
    q, k, v, tq, tk, tv, _ = operands(80, 80, 32, 32, B=1)

    def loss(w, implementation, fused):
        def net(t):
            attend = functools.partial(attention, mask=mask, implementation=implementation, fused=fused)
            return attend(w * q + t * tq, k + w * t * tk, v + t * tv)

        o, to = jax.jvp(net, (0.3,), (1.0,))
        return ((o - jax.lax.stop_gradient(o - 0.1 * to)) ** 2).sum() + (o * jax.lax.stop_gradient(to)).sum()

    run = functools.partial(jax.jit, static_argnums=(1, 2))(jax.value_and_grad(loss))
    want = run(1.1, "reference", False)
    for fused in (False, True):
        np.testing.assert_allclose(run(1.1, "pallas_triton", fused), want, rtol=1e-4)


def test_what_is_not_served():
    q, k, v, *_ = operands(8, 8, 16, 512)
    with pytest.raises(NotImplementedError, match="v have head width 512; the Pallas kernels take at most 256"):
        attention(q, k, v, implementation="pallas_triton")
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="not float64"):
        attention(*(x.astype(jnp.float64) for x in (q, k, v)), implementation="pallas_triton")


@pytest.mark.parametrize("bad", [{"block_q": 48}, {"block_k": 8}, {"num_warps": 3}, {"num_stages": 0}])
def test_tiles_are_checked(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))} must be"):
        Tiles(**{"block_q": 64, "block_k": 64} | bad)


# --- lowering for CUDA, on a machine without one ----------------------------------------------------------------------


def lowered_kernels(S, K, D, dtype, mask):
    """Names of the Triton kernels that a program with all of ours lowers to."""

    def all_kernels(q, k, v, tq, tk, tv, do):
        o, lse = pallas_triton.forward(q, k, v, mask, 0.1)
        to = pallas_triton.tangent(q, k, v, o, lse, tq, tk, tv, mask, 0.1)
        both = pallas_triton.fused(q, k, v, tq, tk, tv, mask, 0.1)
        return to, both, pallas_triton.backward(q, k, v, o, lse, do, mask, 0.1)

    shapes = [jax.ShapeDtypeStruct((1, n, 2, D), dtype) for n in (S, K, K, S, K, K, S)]
    with abstract_gpu():
        text = jax.jit(all_kernels).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    return {kind for kind in KINDS if f'name = "attention_{kind}"' in text}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    ("S", "K", "D", "mask"),
    [
        (1024, 1024, 64, None), (999, 515, 96, None), (15, 15, 24, None), (1560, 32760, 128, KeyRuns(kv_len=4680)),
        (64, 64, 256, None), (80, 80, 128, TEACHER_FORCING),
    ],
    ids=["even", "odd", "short", "cache", "wide", "runs"],
)  # fmt: skip
def test_every_kernel_lowers_for_cuda(S, K, D, mask, dtype):
    assert lowered_kernels(S, K, D, dtype, mask) == set(KINDS)


def triton_ir(B, S):
    """The forward kernel's, as text."""
    x = jax.ShapeDtypeStruct((B, S, 40, 128), jnp.bfloat16)
    with abstract_gpu():
        call = jax.jit(lambda q, k, v: pallas_triton.forward(q, k, v, None, 0.1))
        module = call.trace(x, x, x).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    found = []

    def look(op):
        if "mhlo.backend_config" in op.attributes:
            found.append(op.attributes["mhlo.backend_config"])
        return ir.WalkResult.ADVANCE

    module.operation.walk(look)
    with mlir.make_ir_context() as context:
        jax_triton.dialect.register_dialect(context)
        return str(ir.Module.parse(ir.StringAttr(found[0]["ir"]).value_bytes))


def test_offsets_that_pass_31_bits_are_computed_in_64():
    """Six 720p videos of Wan 14B in one operand are more elements than an int32 counts; five are not."""

    def offsets(B):
        pointers = re.findall(
            r"tt\.addptr .*: (?:tensor<\S+x)?!tt\.ptr<bf16>>?, (?:tensor<\S+x)?(i\d+)", triton_ir(B, 75600)
        )
        assert pointers
        return set(pointers)

    assert 5 * 75600 * 40 * 128 < 2**31 < 6 * 75600 * 40 * 128
    assert offsets(5) == {"i32"}
    assert offsets(6) == {"i64"}


@pytest.fixture
def compiles_for_gpus():
    try:
        absent("h100", 1), sass.find_tool("ptxas"), sass.find_tool("nvdisasm")
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_the_tiles_that_ship_do_not_spill_in_their_loops(gpu, compiles_for_gpus):
    assert kernel_tiles.report([gpu], dtypes=["bfloat16"], widths=[64, 128]) == 0
    assert kernel_tiles.report([gpu], dtypes=["float32"], widths=[AUTO_MAX_WIDTH["float32"]], masks=["none"]) == 0


@pytest.mark.long
@pytest.mark.optimised
def test_no_product_is_executed_twice(compiles_for_gpus, capsys):
    """Warp groups that share the rows of a tile would all compute them."""
    kernel_tiles.report(["h100"], dtypes=["bfloat16"], widths=[128], masks=["none"])
    rows = [row.split("|") for row in capsys.readouterr().out.splitlines()]
    column = [cell.strip() for cell in rows[0]].index("executed / useful")
    assert [float(row[column]) for row in rows[2:]] == [1] * len(KINDS)


# --- anything that fits -----------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    S, K = draw(st.integers(1, 70)), draw(st.integers(1, 100))
    kv_len = draw(st.none() | st.integers(0, K))
    if not draw(st.booleans()):
        return S, K, None if kv_len is None else KeyRuns(kv_len=kv_len)
    ends = (*sorted(draw(st.sets(st.integers(1, S), max_size=4)) - {S}), S)
    runs = []
    for _ in ends:
        cuts = sorted(draw(st.sets(st.integers(0, K), max_size=6)))
        runs.append(tuple(zip(cuts[::2], cuts[1::2], strict=False)))
    return S, K, KeyRuns(ends, tuple(runs), kv_len)


@pytest.mark.slow
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(problems(), st.sampled_from([(16, 16), (16, 24), (64, 40)]), st.sampled_from([16, 32]))
def test_any_lengths_and_masks(problem, widths, block):
    S, K, mask = problem
    arrays = operands(S, K, *widths, B=1)
    close(pallas(arrays, mask, Tiles(block, 32)), expected(arrays, mask), 1e-5)


# --- few queries, many keys: the keys in parts ------------------------------------------------------------------------


IN_PARTS = {  # queries, keys, mask, parts
    "no mask": (20, 150, None, 3),
    "a short cache": (20, 150, KeyRuns(kv_len=5), 4),  # one tile: three parts see nothing
    "an empty cache": (20, 150, KeyRuns(kv_len=0), 2),
    "half a cache": (20, 150, KeyRuns(kv_len=77), 3),
    "a full cache": (20, 150, KeyRuns(kv_len=150), 5),
    "runs, rows without keys": (50, 50, BLIND_ROWS, 2),
    "runs and kv_len": (90, 90, KeyRuns(WINDOW_AND_SINK.query_ends, WINDOW_AND_SINK.runs, kv_len=64), 3),
}


@pytest.mark.parametrize("case", IN_PARTS)
def test_keys_in_parts_give_the_same(case):
    S, K, mask, parts = IN_PARTS[case]
    q, k, v, *_ = operands(S, K, 32, 24)

    @jax.jit
    def run(mask):
        return pallas_triton.in_parts(q, k, v, mask, 0.2, Tiles(16, 16), parts)

    close(run(mask), jax.jit(lambda mask: reference.forward(q, k, v, mask, 0.2))(mask))


def test_how_many_parts():
    def parts(S, K, N=12, cores=132, B=1):
        q, k = (jax.ShapeDtypeStruct((B, n, N, 128), jnp.bfloat16) for n in (S, K))
        return parts_for(q, k, Tiles(128, 128, 8, 2), cores)

    assert parts(1560, 32760) > 1  # 13 x 12 programs are two waves of 132, the second nearly empty
    assert parts(32760, 32760) == parts(4680, 512) == 1  # many waves; few keys
    assert parts(1560, 32760, cores=None) == 1
    assert parts(128, 32760, N=1) == 8  # one program
    assert parts(1560, 32760, N=132) == parts(1560, 32760, B=11) == 1
