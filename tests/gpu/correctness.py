"""Stage 1: every kernel against float64, over masks, precisions and widths; the goldens through the kernels."""

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from rcm_jax.kernels.backends import load_backend
from rcm_jax.kernels.bench_errors import exact, misses
from rcm_jax.kernels.bench_shapes import Shape, operands, packed
from rcm_jax.kernels.masks import KeyRuns
from tests import golden_networks
from tests.golden import CASES
from tests.golden_common import load_case, run_case
from tests.gpu.parts import Context, Part

GOLDENS = Path(__file__).parents[1] / "goldens"
DTYPES = ("bfloat16", "float16", "float32")
WIDTHS = (24, 64, 96, 256)
TIMES_XLA, FLOOR = 2.0, 1e-6  # an error may be twice that of the same sums by XLA, and this more
RESULTS = ("forward", "tangent", "forward+tangent", "backward")


def shapes(tiny: bool) -> list[Shape]:
    """One of every kind of mask at width 128, and every width without a mask and with one; lengths are odd."""
    frame, queries, keys = (3, 37, 45) if tiny else (130, 1037, 1301)
    forced = packed("c1-1", 4, frame)
    window = KeyRuns((2 * frame, 5 * frame), (((0, 2 * frame),), ((0, 2), (frame, 5 * frame))))
    blind = KeyRuns((7, queries - 4, queries), (((3, 20),), (), ((0, 1), (30, 31), (35, keys))))
    masks = {
        "dense": (queries, keys, None), "cache": (queries, keys, KeyRuns(kv_len=keys // 2 + 1)),
        "full cache": (queries, keys, KeyRuns(kv_len=keys)), "teacher forcing": (8 * frame, 8 * frame, forced),
        "window and sink": (5 * frame, 5 * frame, window), "rows without keys": (queries, keys, blind),
    }  # fmt: skip
    wide = 16 if tiny else 128
    chosen = [(name, wide) for name in masks]
    if not tiny:
        chosen += list(itertools.product(("dense", "teacher forcing"), WIDTHS))
    return [Shape(f"{name}, {width} wide", *masks[name][:2], 3, width, masks[name][2], 2) for name, width in chosen]


def parts(context: Context) -> Iterator[Part]:
    for shape in shapes(context.tiny):
        for dtype in ("float32",) if context.tiny else DTYPES:
            yield Part(f"{shape.name}, {dtype}", functools.partial(kernels, shape, dtype))
    for path in sorted(GOLDENS.glob("dit_jvp*.safetensors" if context.tiny else "*.safetensors")):
        yield Part(path.stem, functools.partial(golden, path))


def kernels(shape: Shape, dtype: str) -> dict:
    """Errors of all kernels, as shares of what is allowed: at most 1 is right."""
    x = operands(shape, dtype)
    want = exact(shape, x)
    ours, xla = (jax.jit(all_passes(name, shape))(x) for name in ("pallas_triton", "xla"))
    result = {"ok": True}
    for kind in RESULTS:
        got, by_xla = misses(kind, ours[kind], want), misses(kind, xla[kind], want)
        for name, errors in got.items():
            allowed = [TIMES_XLA * e + FLOOR for e in by_xla[name]]
            share = max(e / a for e, a in zip(errors, allowed, strict=True))
            label = f"fused {name}" if kind == "forward+tangent" else name
            result[label] = share
            result["ok"] &= bool(share <= 1)  # False for NaN too
    return result


def all_passes(name: str, shape: Shape) -> Callable[[dict], dict]:
    backend, mask, scale = load_backend(name), shape.mask, shape.scale

    def run(x: dict) -> dict:
        qkv, t = (x["q"], x["k"], x["v"]), (x["tq"], x["tk"], x["tv"])
        o, lse = backend.forward(*qkv, mask, scale)
        return {
            "forward": o, "tangent": backend.tangent(*qkv, o, lse, *t, mask, scale),
            "forward+tangent": backend.fused(*qkv, *t, mask, scale)[::2],
            "backward": backend.backward(*qkv, o, lse, x["do"], mask, scale),
        }  # fmt: skip

    return run


def golden(path: Path) -> dict:
    """The public PyTorch code's numbers through the kernels, with whole float32 products around them."""
    before, golden_networks.ATTENTION = golden_networks.ATTENTION, "pallas_triton"
    try:
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            report = run_case(load_case(path), CASES)
    finally:
        golden_networks.ATTENTION = before
    return {"ok": report.ok, "worst": report.worst().name, "of its tolerance": float(report.worst().share())}
