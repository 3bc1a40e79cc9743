"""Which backend serves which pass, and the passes that cuDNN has. Its own numbers need a GPU: the tests marked so."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.aot.compile import compile_for
from rcm_jax.kernels import choice, cudnn, xla
from rcm_jax.kernels.attention import Backend, attention
from rcm_jax.kernels.backends import load_backend
from rcm_jax.kernels.choice import PASSES, Call, explain
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.target import Target
from rcm_jax.parallel import make_mesh, sharded_attention
from tests.kernels.attention_cases import Operands, close, first_order, plain

H100 = Target("NVIDIA H100 80GB HBM3", 9.0)
VIDEO = Call(H100, True, "bfloat16", (128, 128), 32760, 32760)
DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"

# --- the table ------------------------------------------------------------------------------------------------------


def chosen(call):
    return tuple(c.backend for c in explain(call))


@pytest.fixture
def cudnn_is_there(monkeypatch):
    monkeypatch.setattr(cudnn, "missing", lambda: None)


OURS = ("pallas_triton",) * 4
MIXED = ("cudnn", "pallas_triton", "pallas_triton", "cudnn")
XLA = ("xla",) * 4
CASES = {  # name, as the documentation has it: (what differs from VIDEO, backends, the reason why not cuDNN)
    "bfloat16, heads up to 128 wide": ({}, MIXED, None),
    "the same on an A100": ({"device": Target("NVIDIA A100-SXM4-80GB", 8.0)}, MIXED, None),
    "a mask of runs": ({"runs": True}, OURS, "no masks of runs"),
    "a GPU that is not here": ({"here": False}, OURS, "the GPU is not here"),
    "float16": ({"dtype": "float16"}, OURS, "takes bfloat16, not float16"),
    "heads 129 to 256 wide": ({"widths": (256, 256)}, OURS, "a multiple of 8 up to 128, not 256 and 256"),
    "v of another width": ({"widths": (128, 64)}, OURS, "not 128 and 64"),
    "fewer than 64 queries or keys": ({"keys": 63}, OURS, "63 tokens are fewer than 64"),
    "float32, heads up to 64 wide": ({"dtype": "float32", "widths": (64, 64)}, OURS, "not float32"),
    "float32, wider": ({"dtype": "float32"}, XLA, "not float32"),
    "heads wider than 256": ({"widths": (384, 384)}, XLA, "not 384 and 384"),
    "an older GPU": ({"device": Target("Tesla V100-SXM2-16GB", 7.0)}, XLA, "V100.* is no NVIDIA GPU of compute cap"),
    "no GPU": ({"device": Target("cpu", None)}, XLA, "cpu is no NVIDIA GPU"),
}


@pytest.mark.parametrize("case", CASES)
def test_backends_and_reasons(cudnn_is_there, case):
    changes, backends, reason = CASES[case]
    choices = explain(dataclasses.replace(VIDEO, **changes))
    assert tuple(c.backend for c in choices) == backends
    assert tuple(c.kind for c in choices) == PASSES
    for c in (choices[0], choices[3]):
        refused = dict(c.instead_of)
        assert ("cudnn" in refused) == (reason is not None)
        assert reason is None or re.search(reason, refused["cudnn"])
    assert all("cudnn" not in dict(c.instead_of) for c in choices[1:3]), "it has no tangent to be passed over"


def test_the_documentation_has_the_table(cudnn_is_there):
    rows = {}
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if cells[0] in CASES:
            rows[cells[0]] = tuple(cells[1:])
    assert rows == {case: backends for case, (_, backends, _) in CASES.items()}


def test_without_cudnn_our_kernels_serve(monkeypatch):
    monkeypatch.setattr(cudnn, "missing", lambda: "cuDNN not found")
    assert chosen(VIDEO) == OURS
    said = "forward: pallas_triton, kernels for every pass and mask; not cudnn: cuDNN not found"
    assert str(explain(VIDEO)[0]) == said


def test_a_machine_without_a_gpu_uses_xla():
    x = jnp.zeros((1, 8, 2, 64))
    if jax.devices()[0].platform != "gpu":
        assert choice.choose(Call.of(x, x, x, None)) is load_backend("xla")


@pytest.mark.aot
def test_the_mesh_that_is_set_decides(absent_mesh):
    x = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    with jax.set_mesh(absent_mesh):
        assert choice.choose(Call.of(x, x, x, None)) is load_backend("pallas_triton")
        assert not Call.of(x, x, x, None).here


# --- what is compiled for a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def as_if_here(monkeypatch):
    """An H100 with cuDNN, as far as JAX asks before it compiles: without, it does not trace the calls."""
    monkeypatch.setattr(choice, "target", lambda: H100)
    monkeypatch.setattr(choice, "_is_here", lambda device: True)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    cudnn.missing.cache_clear()
    yield
    cudnn.missing.cache_clear()


def kernels(f, *x):
    """The attention kernels of the program that f is lowered to for CUDA, in order of name."""
    text = jax.jit(f).trace(*x).lower(lowering_platforms=("cuda",)).as_text()
    return named(line for line in text.splitlines() if "stablehlo.custom_call" in line)


def named(calls):
    return sorted(re.search(r"attention_(tangent|fused|forward|dq|dkv)\b|__cudnn\$\w+", call)[0] for call in calls)


FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
OWN_BACKWARD = ["attention_dkv", "attention_dq"]
DEAD = FORWARD  # what jax.vjp runs inside of cuDNN's backward pass, which nothing uses: XLA removes it, see below
RUNS = KeyRuns((128, 256), (((0, 128),), ((0, 256),)))


def loss(q, k, v, **options):
    o, to = jax.jvp(functools.partial(attention, **options), (q, k, v), (k, v, q))
    return ((o - jax.lax.stop_gradient(o + to)).astype(jnp.float32) ** 2).sum()


@pytest.mark.parametrize(
    ("f", "want"),
    [
        (attention, [FORWARD]),
        (functools.partial(attention, mask=KeyRuns(kv_len=200)), [FORWARD]),
        (functools.partial(attention, mask=RUNS), ["attention_forward"]),
        (lambda q, k, v: jax.jvp(attention, (q, k, v), (k, v, q)), [FORWARD, "attention_tangent"]),
        (lambda q, k, v: jax.vjp(attention, q, k, v)[1](q), [FORWARD, DEAD, BACKWARD]),
        (jax.grad(loss), [FORWARD, DEAD, BACKWARD, "attention_tangent"]),
        (jax.grad(functools.partial(loss, fused=True)), [DEAD, BACKWARD, "attention_fused"]),
        (jax.grad(functools.partial(loss, fused=True, mask=RUNS)), [*OWN_BACKWARD, "attention_fused"]),
        (functools.partial(attention, implementation="pallas_triton"), ["attention_forward"]),
    ],
    ids=["forward", "kv_len", "runs", "jvp", "vjp", "one pass", "fused", "fused, runs", "by name"],
)
def test_kernels_of_a_program(as_if_here, f, want):
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    assert kernels(f, x, x, x) == sorted(want)


def test_cudnn_serves_under_meshes(as_if_here):
    """The calls are not partitioned, whether a mesh is set, its axes are manual, or there is none (the test above)."""
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        assert kernels(attention, x, x, x) == [FORWARD]
    mesh = make_mesh(devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert kernels(sharded_attention(mesh), x, x, x) == [FORWARD]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("f", "want"),
    [
        (lambda q, k, v: jax.vjp(attention, q, k, v)[1](q), [FORWARD, BACKWARD]),
        (jax.grad(functools.partial(loss, fused=True)), [BACKWARD, "attention_fused"]),
    ],
    ids=["vjp", "fused"],
)
def test_cudnns_backward_runs_without_its_forward(as_if_here, absent_mesh, f, want):
    """XLA compiles the calls without cuDNN, if without their workspace."""
    sharding = jax.sharding.NamedSharding(absent_mesh, jax.P())
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16, sharding=sharding)
    with jax.set_mesh(absent_mesh):
        hlo = compile_for(f, x, x, x).hlo
    assert named(line for line in hlo.splitlines() if "custom-call(" in line) == want


# --- what is made of cuDNN's results --------------------------------------------------------------------------------


def stand_in(q, k, v, *, scale, implementation, key_value_seq_lengths=None):
    """jax.nn.dot_product_attention by "xla", but with what cuDNN's keeps for its gradient, and a gradient from that."""
    assert implementation == "cudnn"
    lengths = jnp.full(q.shape[0], k.shape[1], jnp.int32) if key_value_seq_lengths is None else key_value_seq_lengths
    by_xla = functools.partial(dot_product, scale=scale, implementation="xla")

    def keep(q, k, v, lengths):
        o = by_xla(q, k, v, key_value_seq_lengths=lengths)
        o = jnp.where(((lengths > 0) & (lengths <= k.shape[1]))[:, None, None, None], o, jnp.nan)  # none is promised
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        _, lse = by_xla(*wide, key_value_seq_lengths=lengths, return_residual=True)
        return o, (q, k, v, lengths, jnp.swapaxes(lse, 1, 2), o)

    def pull(kept, do):
        q, k, v, lengths, lse, o = kept
        return *xla.backward(q, k, v, o, lse, do, KeyRuns(kv_len=lengths[0]), scale), None

    attend = jax.custom_vjp(lambda *x: keep(*x)[0])
    attend.defvjp(keep, pull)
    return attend(q, k, v, lengths)


dot_product = jax.nn.dot_product_attention


@pytest.fixture
def standing_in(monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)


def numbers(dtype=jnp.float32):
    rng = np.random.default_rng(3)
    shapes = [(2, 12, 4, 8), (2, 20, 4, 8), (2, 20, 4, 8)] * 2 + [(2, 12, 4, 8)]
    return Operands(*(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes))


@pytest.mark.parametrize("kv_len", [None, 9, 0, 99])
def test_forward_and_backward_are_those_of_xla(standing_in, kv_len):
    a, mask = numbers(), None if kv_len is None else KeyRuns(kv_len=jnp.int32(kv_len))
    run, want = (jax.jit(functools.partial(f, mask=mask, scale=0.3)) for f in (cudnn._forward, xla.forward))
    close(run(*a.x), want(*a.x))
    o, lse = want(*a.x)
    run, want = (jax.jit(functools.partial(f, mask=mask, scale=0.3)) for f in (cudnn._backward, xla.backward))
    for given in ((o, lse), (o + 1, lse + 1)):  # it goes by these, not by a forward pass of its own
        close(run(*a.x, *given, a.do), want(*a.x, *given, a.do))


def test_lse_is_float32_to_the_last_bits(standing_in):
    a = numbers(jnp.bfloat16)
    _, lse = jax.jit(functools.partial(cudnn._forward, mask=None, scale=0.3))(*a.x)
    close(lse, xla.forward(*a.x, None, 0.3)[1], 1e-6)


def test_passes_of_several_backends_make_one(standing_in):
    """cuDNN's value and gradient, our tangent."""
    a, mask = numbers(), KeyRuns(kv_len=9)
    backend = Backend(cudnn._forward, xla.tangent, cudnn._backward)
    got = first_order(functools.partial(attention, implementation=backend), a, mask)
    close(got, first_order(plain, a, mask))


def test_a_jax_that_keeps_something_else_is_noticed(monkeypatch):
    by_xla = lambda *x, implementation, **options: dot_product(*x, implementation="xla", **options)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    cudnn.missing.cache_clear()
    assert re.match(r"jax.vjp keeps o \d times and lse \d times for cuDNN, not once", cudnn.missing())
    cudnn.missing.cache_clear()


def test_on_another_platform_xla_computes_the_passes(as_if_here):
    a = numbers(jnp.bfloat16)
    want = xla.forward(*a.x, None, 0.3)
    close(jax.jit(functools.partial(cudnn.forward, mask=None, scale=0.3))(*a.x), want)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_len", [None, 300, 0])
def test_what_a_gpu_computes_is_what_xla_does(kv_len):
    """Value, tangent and gradients in bfloat16 by what is chosen there, within twice XLA's own error."""
    rng = np.random.default_rng(4)
    narrow = Operands(*(jnp.asarray(rng.normal(size=(2, 512, 4, 128)), jnp.bfloat16) for _ in range(7)))
    mask = None if kv_len is None else KeyRuns(kv_len=kv_len)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    exact = first_order(functools.partial(attention, implementation="reference"), wide, mask)
    auto, by_xla = (
        first_order(functools.partial(attention, implementation=name), narrow, mask) for name in ("auto", "xla")
    )
    for ours, theirs, want in zip(auto, by_xla, exact, strict=True):
        error, allowed = (np.linalg.norm(np.float32(x) - want) for x in (ours, theirs))
        assert error <= 2 * allowed + 1e-6
