"""The benchmark, the tuner and the table of tiles, where there is no GPU."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.aot.compile import absent, check_plugin
from rcm_jax.kernels import bench, bench_clock, bench_errors, bench_torch, bench_triton, reference, tune, tune_prune
from rcm_jax.kernels.bench_clock import Ready
from rcm_jax.kernels.bench_shapes import PRODUCTS, SHAPES, Shape, operands
from rcm_jax.kernels.masks import KeyRuns, dense
from rcm_jax.kernels.tiles import KINDS, WIDTHS, Tiles, table, tiles_for
from rcm_jax.parallel import make_mesh
from tests.test_entry_points import fails


def shape(S, K, D, dtype):
    return [jax.ShapeDtypeStruct((1, n, 2, D), dtype) for n in (S, K, K)]


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_the_table_is_whole(gpu):
    for kind in KINDS:
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
            for width in (16, 24, *WIDTHS):
                assert isinstance(tiles_for(kind, *shape(4096, 4096, width, dtype), gpu=(gpu,)), Tiles)


def test_tiles_shrink_to_short_sequences_and_fall_back():
    long, short = (tiles_for("forward", *shape(S, 4096, 128, jnp.bfloat16), gpu=("sm_90",)) for S in (4096, 20))
    assert short.block_q == 32 < long.block_q
    assert short.block_k == long.block_k
    unknown = tiles_for("forward", *shape(4096, 4096, 128, jnp.bfloat16), gpu=("a GPU nobody timed", "sm_75"))
    assert unknown == Tiles(*table()["sm_80"]["forward"]["2 bytes"]["128"])


def test_pairs_are_counted_as_the_mask_has_them():
    for case in ("tiny", "tf-c1-4"):
        problem = SHAPES[case]
        if problem.queries < 1000:
            assert problem.pairs == int(dense(problem.mask, problem.queries, problem.keys).sum())
    video = SHAPES["wan-1.3b"]
    assert abs(video.flops("forward") / 2 - 3.30e12) < 0.01e12, "a product at 32,760 tokens is 3.30 TFLOP"
    packed = SHAPES["tf-c1-1"]
    frames = 21
    assert packed.pairs == 1560**2 * (2 * frames * (frames + 1) // 2)


TINY = ["--shapes", "tiny", "--repeats", "1", "--dtype", "float32"]


@pytest.mark.long
def test_the_benchmark_runs_and_says_what_it_left_out(tmp_path, capsys):
    out, picture = tmp_path / "bench.jsonl", tmp_path / "bench.png"
    peers = ["pallas_triton", "pallas_fused", "xla", "cudnn", "rcm", "jvp_flash_attention"]
    bench.main([*TINY, "--peers", *peers, "--json", str(out), "--plot", str(picture)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    timed = {(r["peer"], r["pass"]): r for r in rows if "ms" in r}
    split = {(p, k) for p in ("pallas_triton", "xla") for k in PRODUCTS}
    assert set(timed) == split | {("pallas_fused", "forward+tangent")}
    for row in timed.values():
        assert all(0 < e < 1e-5 for pair in [*row["errors"].values(), *row["errors of xla"].values()] for e in pair)
        assert (row["clock"], row["dtype"], row["jax"]) == ("host", "float32", jax.__version__)
    assert set(timed["pallas_fused", "forward+tangent"]["errors"]) == {"o", "to"}
    assert "dkv" in timed["pallas_triton", "backward"]["tiles"]
    assert {r["peer"] for r in rows if "reason" in r} == {"cudnn", "rcm", "jvp_flash_attention"}
    assert picture.stat().st_size > 1000
    assert "left out: give --rcm PATH" in capsys.readouterr().out


def test_the_backward_pass_is_timed_alone(capsys):
    bench.main(["--shapes", "tiny-dense", *TINY[2:], "--peers", "naive", "--passes", "backward"])
    (row,) = [words.split() for words in capsys.readouterr().out.splitlines() if "naive" in words]
    assert row[:3] == ["tiny-dense", "backward", "naive"]
    assert float(row[3]) > 0


def test_a_stopped_benchmark_goes_on(tmp_path, monkeypatch):
    """Rows that are in the file are not measured again, one that was cut off is, and refusals are said once."""
    out = tmp_path / "bench.jsonl"
    command = [*TINY, "--peers", "xla", "cudnn", "--passes", "forward", "tangent", "--json", str(out)]
    bench.main(command)
    first, second, refused = out.read_text().splitlines()
    out.write_text(f"{first}\n{refused}\n{second[:40]}")
    measured = []

    def milliseconds(ready, repeats):
        measured.append(ready)
        return [1.0] * repeats

    monkeypatch.setattr(bench_clock, "milliseconds", milliseconds)
    bench.main(command)
    assert len(measured) == 2, "the roof, and the row that was cut off"
    lines = out.read_text().splitlines()
    assert lines[:3] == [first, refused, second[:40]]
    assert [json.loads(line)["pass"] for line in lines[3:]] == ["tangent"]


@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny-dense", marks=pytest.mark.slow), "bounded"])
def test_exact_results_are_those_of_the_reference(name, monkeypatch):
    """With chunks that do not divide the queries."""
    monkeypatch.setattr(bench_errors, "ROWS", 20)
    bounded = Shape("bounded", 24, 40, 2, 16, KeyRuns(kv_len=33), batch=2)
    problem = SHAPES.get(name, bounded)
    with jax.enable_x64(True):
        x = {n: value.astype("float64") for n, value in operands(problem, "float32").items()}
        mask, scale = problem.mask, problem.scale
        o, lse = reference.forward(x["q"], x["k"], x["v"], mask, scale)
        residuals = x["q"], x["k"], x["v"], o, lse
        to = reference.tangent(*residuals, x["tq"], x["tk"], x["tv"], mask, scale)
        want = {"o": o, "to": to} | dict(
            zip(("dq", "dk", "dv"), reference.backward(*residuals, x["do"], mask, scale), strict=True)
        )
    got = bench_errors.exact(problem, x)
    for key in want:
        assert got[key].dtype == "float64"
        np.testing.assert_allclose(got[key], want[key], rtol=0, atol=1e-12)


def test_no_row_and_no_head_can_hide_an_error():
    want = {"o": np.ones((2, 50, 3, 4))}
    got = jnp.ones((2, 50, 3, 4), "float32").at[1, 49, 2].add(0.1)
    whole, worst = bench_errors.misses("forward", got, want)["o"]
    np.testing.assert_allclose([whole, worst], [0.1 / 300**0.5, 0.1], rtol=1e-5)
    assert np.isnan(bench_errors.misses("forward", got.at[0, 0, 0, 0].set(jnp.nan), want)["o"]).all()


def test_a_time_is_that_of_the_kernels_of_one_run(monkeypatch):
    """CUPTI is started for each run after the flush, and stopped; launches are not in the time."""
    told = []

    class Cupti:
        def _cupti_init(self):
            told.append("start")

        def _cupti_get_timings(self, finalize):
            told.append("stop")
            return [("a", 1.5), ("b", 0.25)] if "run" in told else []

    monkeypatch.setattr(bench_clock, "on_gpu", lambda: True)
    monkeypatch.setattr(bench_clock, "_cupti", Cupti)
    monkeypatch.setattr(bench_clock, "_flush", lambda: told.append("flush"))
    ready = Ready(lambda: told.append("run"))
    assert bench_clock.milliseconds(ready, 2) == [1.75, 1.75]
    assert told == ["run"] * 2 + ["flush", "start", "run", "stop"] * 2
    assert bench_clock.clock() == "CUPTI"
    told.clear()
    with pytest.raises(RuntimeError, match="another profiler"):
        bench_clock._one(Ready(lambda: None))


@pytest.mark.parametrize("shape", ["tiny", "tiny-dense"])
def test_torch_computes_on_the_same_buffers(shape):
    pytest.importorskip("torch")
    problem = bench.Problem(SHAPES[shape], "float32")
    passes = {"tiny": bench_torch.flex, "tiny-dense": bench_torch.scaled_dot_product}[shape](problem.shape)
    for kind in ("forward", "backward") if shape == "tiny-dense" else ("forward",):  # flex: no gradient on a CPU
        errors = problem.errors(kind, passes[kind](problem.operands))
        assert all(0 < e < 1e-5 for pair in errors.values() for e in pair)


@pytest.mark.long
def test_a_published_kernel_compiles_as_it_is_launched(monkeypatch):
    """That of jvp_flash_attention, for a GPU that is not here."""
    for name in ("jax_triton", "triton"):
        pytest.importorskip(name)
    if importlib.util.find_spec("jvp_flash_attention") is None:
        pytest.skip("pip install --no-deps jvp_flash_attention")
    monkeypatch.setattr(bench_triton, "fastest", lambda choices: list(choices.values())[-1]())
    problem = SHAPES["short-1024"]
    x = jax.eval_shape(lambda: operands(problem, "bfloat16"))
    with jax.set_mesh(make_mesh(devices=absent("h100", 1))):
        bench_triton.jvp_flash_attention(problem)["forward+tangent"](x)
        with pytest.raises(NotImplementedError, match="none of its tiles divides 32760 tokens"):
            bench_triton.jvp_flash_attention(SHAPES["wan-1.3b"])


def test_the_fastest_configuration_counts_and_refusals_do_not(monkeypatch):
    def refuses():
        raise RuntimeError("too much shared memory")

    times = {(64, 64, 4, 3): 3.0, (128, 64, 8, 3): 2.0, (64, 32, 4, 3): 4.0}
    choices = {(16, 16, 4, 3): refuses} | {c: lambda c=c: Ready(lambda: c) for c in times}
    monkeypatch.setattr(bench_triton, "median", lambda ready, _: times[ready.run()])
    best = bench_triton.fastest(choices)
    assert best.run() == (128, 64, 8, 3)
    assert best.facts == {"tiles": "128x64, 8 warps, 3 stages", "tiles tried": 4}
    with pytest.raises(RuntimeError, match="none of its 1 configurations runs: too much shared memory"):
        bench_triton.fastest({(16, 16, 4, 3): refuses})


def test_published_files_are_read_without_what_their_kernels_do_not_use(tmp_path):
    """torch need not be there; what is there is put back."""
    file = tmp_path / "published.py"
    file.write_text(
        "import torch\nfrom torch.autograd import Function\nimport torch.autograd.forward_ad as ad\n"
        "class Op(Function):\n    @staticmethod\n    def forward(x): return x\n"
        "apply, gpu = Op.apply, bool(torch.cuda.is_available())\n"
    )
    before = sys.modules.get("torch")
    module = bench_triton.load("published_for_a_test", file)
    assert (module.Op.forward(1), module.gpu) == (1, False)
    assert sys.modules.get("torch") is before


def test_outputs_are_tried_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "facts_of_the_run", lambda *_: pytest.fail("computes"))
    monkeypatch.setattr(tune, "tune", lambda *_: pytest.fail("computes"))
    (tmp_path / "file").write_text("in the way")
    there = str(tmp_path / "file" / "x.png")
    fails(bench.main, ["--json", there], f"cannot write --json={there}")
    fails(bench.main, ["--plot", there], f"cannot write --plot={there}")
    fails(bench.main, ["--plot", "x.webp"], "--plot=x.webp must end in .png, .pdf or .svg")
    fails(tune.main, ["--anyway", "--out", there], f"cannot write --out={there}")


def test_tuning_writes_a_table_and_goes_on_from_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "candidates", lambda: [Tiles(32, 32), Tiles(16, 16)])
    out = tmp_path / "tiles.json"
    command = ["--kinds", "forward", "dkv", "--dtypes", "float32", "--widths", "64", "--tokens", "64",
               "--repeats", "1", "--anyway", "--out", str(out)]  # fmt: skip
    tune.main(command)
    (entry,) = json.loads(out.read_text()).values()
    for kind in ("forward", "dkv"):
        assert entry[kind]["4 bytes"]["64"][:2] in ([32, 32], [16, 16])
    monkeypatch.setattr(tune, "tune", lambda *_: pytest.fail("tunes again"))
    tune.main(command)
    assert "is in" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: tune needs an NVIDIA GPU"):
        tune.main(["--out", str(out)])


def test_candidates_that_spill_or_compute_twice_are_not_run(monkeypatch, capsys):
    """Products: eight warps of an sm_90 want 128 rows that stay. Spills: other stages of tiles that spill a lot are not
    even compiled."""
    spills = {Tiles(128, 128, 4, 2): 500, Tiles(128, 64, 8, 3): 8}
    monkeypatch.setattr(tune_prune, "executed", lambda rows, warps: max(1, 16 * warps / rows))
    monkeypatch.setattr(tune_prune, "cost_of", lambda tiles: tune_prune.Cost(200, spills.get(tiles, 0)))
    asked = []

    def compile_one(tiles):
        asked.append(tiles)
        if tiles == Tiles(128, 128, 8, 3):
            raise RuntimeError("shared memory")
        return tiles

    kept = list(tune_prune.prune(tune.candidates(), compile_one, lambda t: t.block_q, 3))
    assert kept == [Tiles(128, 128, 8, 2), Tiles(128, 64, 4, 2), Tiles(128, 64, 4, 3)]
    assert Tiles(128, 128, 4, 3) not in asked
    assert not list(tune_prune.prune([Tiles(64, 64, 8)], compile_one, lambda t: t.block_q, 3))
    assert "500 bytes spilled, left out" in capsys.readouterr().out


@pytest.mark.long
def test_candidates_for_an_absent_gpu_are_compiled_and_listed(monkeypatch, capsys):
    try:
        check_plugin()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(tune, "candidates", lambda: [Tiles(128, 128, 4), Tiles(64, 64, 8), Tiles(64, 64, 4)])
    tune.main(["--gpu", "h100", "--kinds", "dq", "--dtypes", "bfloat16", "--widths", "128", "--tokens", "512"])
    told = capsys.readouterr().out
    if "registers" not in told:
        pytest.skip(f"jax {jax.__version__} does not show the kernels that it compiles")
    assert "bytes spilled, left out" in told
    assert "remain: Tiles(block_q=64, block_k=64, num_warps=4, num_stages=2)" in told
