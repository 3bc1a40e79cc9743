"""The benchmark, the tuner and the table of tiles, where there is no GPU."""

import json

import jax
import jax.numpy as jnp
import pytest

from rcm_jax.kernels import bench, tune
from rcm_jax.kernels.bench_shapes import PRODUCTS, SHAPES
from rcm_jax.kernels.masks import dense
from rcm_jax.kernels.tiles import KINDS, WIDTHS, Tiles, table, tiles_for
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


def test_the_benchmark_runs_and_says_what_it_left_out(tmp_path, capsys):
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    bench.main(["--shapes", "tiny", "--peers", "pallas_triton", "xla", "tokamax", "torch", "--repeats", "1",
                "--dtype", "float32", "--json", str(out), "--plot", str(picture)])  # fmt: skip
    records = json.loads(out.read_text())["records"]
    timed = {(r["peer"], r["pass"]): r for r in records if "ms" in r}
    assert set(timed) >= {(p, k) for p in ("pallas_triton", "xla") for k in PRODUCTS}
    assert all(r["error"] < 1e-5 for r in timed.values())
    assert {r["peer"] for r in records if "reason" in r} == {"tokamax", "torch"}
    assert picture.stat().st_size > 1000
    assert "left out:" in capsys.readouterr().out


def test_outputs_are_tried_before_anything_is_timed(tmp_path, monkeypatch):
    for name in ("matrix_rate", "measure"):
        monkeypatch.setattr(bench, name, lambda *_: pytest.fail("computes"))
    monkeypatch.setattr(tune, "tune", lambda *_: pytest.fail("computes"))
    (tmp_path / "file").write_text("in the way")
    there = str(tmp_path / "file" / "x.png")
    fails(bench.main, ["--json", there], f"cannot write --json={there}")
    fails(bench.main, ["--plot", there], f"cannot write --plot={there}")
    fails(bench.main, ["--plot", "x.webp"], "--plot=x.webp must end in .png, .pdf or .svg")
    fails(tune.main, ["--anyway", "--out", there], f"cannot write --out={there}")


def test_tuning_writes_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda: [Tiles(32, 32), Tiles(16, 16)])
    out = tmp_path / "tiles.json"
    tune.main(["--kinds", "forward", "dkv", "--dtypes", "float32", "--widths", "64", "--tokens", "64",
               "--repeats", "1", "--anyway", "--out", str(out)])  # fmt: skip
    (entry,) = json.loads(out.read_text()).values()
    for kind in ("forward", "dkv"):
        assert entry[kind]["4 bytes"]["64"][:2] in ([32, 32], [16, 16])
    with pytest.raises(SystemExit, match="error: tune needs an NVIDIA GPU"):
        tune.main(["--out", str(out)])
