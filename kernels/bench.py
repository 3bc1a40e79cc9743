"""Times attention's kernels against their peers: python -m rcm_jax.kernels.bench --json OUT.json --plot OUT.png

Prints a table of milliseconds, TFLOP/s, share of this GPU's measured bfloat16 matrix rate, temporary memory and
largest error, for each shape, pass and peer, all in one run. FLOPs count 2·B·N·D for each allowed (query, key) pair
and matrix product, by convention: forward 2 products, tangent 5, fused 6, backward 5 (we recompute, so do more).
Times are medians over device-timed runs after a warm-up (CUPTI); on a CPU, wall times, good only for trying this out.
Errors are against the blockwise XLA backend in float32 on one head, relative to its largest element.

Peers, each left out with a reason where it is not installed or refuses: xla (our blockwise backend), naive
(jax.nn.dot_product_attention in XLA), cudnn, tokamax, jvp_flash_attention (PyPI), torch (scaled_dot_product_attention).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.cli import command_parser, one_line_errors
from rcm_jax.kernels import xla
from rcm_jax.kernels.bench_peers import PEERS, TimesItself
from rcm_jax.kernels.bench_shapes import DEFAULT_SHAPES, PRODUCTS, SHAPES, Shape, operands
from rcm_jax.outputs import PICTURES, check_output


def device_milliseconds(run: Callable, args: tuple, repeats: int) -> list[float]:
    """Times of a compiled function: on a GPU what CUPTI says of its kernels, else the clock on the wall."""
    jax.block_until_ready(run(*args))
    if jax.devices()[0].platform == "gpu":
        from jax.experimental.mosaic.gpu import profiler

        _, times = profiler.measure(run, iterations=repeats + 1)(*args)
        return list(times)[1:]
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(1e3 * (time.perf_counter() - began))
    return times


def matrix_rate(repeats: int) -> float:
    """TFLOP/s of one large bfloat16 product on this device: what shares are of."""
    n = 8192 if jax.devices()[0].platform == "gpu" else 512
    a = jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16)
    return 2 * n**3 / statistics.median(device_milliseconds(jax.jit(jnp.matmul), (a, a), repeats)) / 1e9


def reference(shape: Shape, x: dict[str, jax.Array]) -> dict[str, tuple]:
    """Each pass's results on the first head, in float32."""
    one = {n: value[:1, :, :1].astype(jnp.float32) for n, value in x.items() if value.ndim == 4}
    scale = shape.width**-0.5

    @jax.jit
    def run(x: dict) -> dict:
        o, lse = xla.forward(x["q"], x["k"], x["v"], shape.mask, scale)
        residuals = x["q"], x["k"], x["v"], o, lse
        to = xla.tangent(*residuals, x["tq"], x["tk"], x["tv"], shape.mask, scale)
        grads = xla.backward(*residuals, x["do"], shape.mask, scale)
        return {"forward": (o,), "tangent": (to,), "fused": (o, to), "backward": grads}

    return run(one)


def error(got, want: tuple) -> float:
    """Largest difference on the first head, relative to the largest element of each result."""
    got = [np.asarray(g[:1, :, :1], np.float32) for g in jax.tree.leaves(got)][-len(want) :]
    return max(float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, map(np.asarray, want), strict=True))


def measure(shape: Shape, peers: list[str], passes: list[str], dtype: str, repeats: int, rate: float) -> Iterator[dict]:
    """One record for each peer and pass; a `reason` instead of numbers where a peer does not serve."""
    x = operands(shape, dtype)
    o, lse = jax.jit(lambda x: xla.forward(x["q"], x["k"], x["v"], shape.mask, shape.width**-0.5))(x)
    x |= {"o": o, "lse": lse}
    want = reference(shape, x)
    for peer in peers:
        record = {"shape": shape.name, "peer": peer, "dtype": dtype}
        try:
            functions = PEERS[peer](shape)
        except (ImportError, NotImplementedError) as reason:
            yield record | {"pass": "all", "reason": str(reason)}
            continue
        forward_ms = None
        for kind, function in functions.items():
            if kind.split(" + ")[-1] not in passes and kind not in passes:
                continue
            try:
                memory, miss = None, None
                if isinstance(function, TimesItself):
                    times = function.run(x, repeats)
                else:
                    run = jax.jit(function).lower(x).compile()
                    memory = run.memory_analysis().temp_size_in_bytes / 2**20
                    miss = error(run(x), want[kind.split(" + ")[-1]])
                    times = device_milliseconds(run, (x,), repeats)
            except Exception as reason:  # a peer may refuse in its own way, and that must not end the run
                yield record | {"pass": kind, "reason": f"{type(reason).__name__}: {str(reason).splitlines()[0][:120]}"}
                continue
            ms = statistics.median(times)
            if kind == "forward":
                forward_ms = ms
            if kind == "forward + backward":
                if forward_ms is None:
                    continue
                kind, ms = "backward", ms - forward_ms
            tflops = shape.flops(kind) / ms / 1e9
            yield record | {
                "pass": kind, "ms": ms, "lowest ms": min(times), "TFLOP/s": tflops, "share": tflops / rate,
                "temporary MiB": memory, "error": miss,
            }  # fmt: skip


def line(record: dict) -> str:
    start = f"{record['shape']:12} {record['pass']:9} {record['peer']:20}"
    if "reason" in record:
        return f"{start} left out: {record['reason']}"
    memory, miss = record["temporary MiB"], record["error"]
    return (
        f"{start} {record['ms']:10.3f} {record['TFLOP/s']:9.1f} {record['share']:6.0%} "
        f"{'' if memory is None else f'{memory:.0f}':>10} {'' if miss is None else f'{miss:.1e}':>9}"
    )


def plot(records: list[dict], out: Path) -> None:
    """Milliseconds of every pass and peer, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in records if "ms" in r]
    shapes = list(dict.fromkeys(r["shape"] for r in records))
    peers = list(dict.fromkeys(r["peer"] for r in records))
    figure, axes = plt.subplots(1, len(shapes), figsize=(1 + 3 * len(shapes), 3.2), squeeze=False, layout="constrained")
    for axis, shape in zip(axes[0], shapes, strict=True):
        kinds = [k for k in PRODUCTS if any(r["shape"] == shape and r["pass"] == k for r in records)]
        for i, peer in enumerate(peers):
            ms = {r["pass"]: r["ms"] for r in records if r["shape"] == shape and r["peer"] == peer}
            at = [kinds.index(k) + (i - len(peers) / 2) * 0.8 / len(peers) for k in ms]
            axis.bar(at, list(ms.values()), 0.8 / len(peers), label=peer, color=f"C{i}", align="edge")
        axis.set(title=shape, xticks=range(len(kinds)), xticklabels=kinds, ylabel="ms", yscale="log")
    axes[0][-1].legend(fontsize="small")
    figure.savefig(out, dpi=120)


def parser() -> argparse.ArgumentParser:
    p = command_parser("kernels.bench", __doc__)
    p.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    p.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    p.add_argument("--passes", nargs="+", choices=PRODUCTS, default=list(PRODUCTS), metavar="PASS")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--repeats", type=int, default=20)
    p.add_argument("--json", type=Path)
    p.add_argument("--plot", type=Path)
    return p


def run(args: argparse.Namespace) -> list[dict]:
    if args.json:
        check_output(args.json, "json")
    if args.plot:
        check_output(args.plot, "plot", PICTURES)
    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    names = args.shapes or (DEFAULT_SHAPES if on_gpu else ["tiny"])
    if not on_gpu:
        print("No GPU here: kernels are interpreted, times mean nothing; this shows that it runs.", file=sys.stderr)
    rate = matrix_rate(args.repeats)
    print(f"{device.device_kind}, jax {jax.__version__}, {args.dtype}; bfloat16 matrix rate {rate:.0f} TFLOP/s")
    print(f"{'shape':12} {'pass':9} {'peer':20} {'ms':>10} {'TFLOP/s':>9} {'share':>6} {'temp MiB':>10} {'error':>9}")
    records = []
    for name in names:
        for record in measure(SHAPES[name], args.peers, args.passes, args.dtype, args.repeats, rate):
            print(line(record), flush=True)
            records.append(record)
    if args.json:
        whole = {"device": device.device_kind, "jax": jax.__version__, "matrix TFLOP/s": rate, "records": records}
        args.json.write_text(json.dumps(whole, indent=1))
    if args.plot:
        plot(records, args.plot)
    return records


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
