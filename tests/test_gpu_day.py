"""The stages of a day on a GPU at toy size: that an hour there is not lost to a typo."""

import json

import jax
import pytest

from tests.gpu import correctness
from tests.gpu.__main__ import STAGES, main
from tests.gpu.parts import Context, Part, run_parts


def results(out, stage):
    return [json.loads(line) for line in (out / f"stage{stage}.jsonl").read_text().splitlines()]


MARKS = {1: pytest.mark.long, 4: pytest.mark.slow, 5: pytest.mark.slow, 6: pytest.mark.long}


@pytest.mark.parametrize("stage", [pytest.param(n, marks=MARKS.get(n, ())) for n in STAGES])
def test_a_stage_runs(stage, tmp_path, capsys):
    assert main(["--stage", str(stage), "--tiny", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    assert all("result" in row and row["device"] == "cpu" for row in results(tmp_path, stage))


def test_a_stage_goes_on_and_runs_what_failed_again(tmp_path, capsys):
    runs = []

    def part(name, *outcomes):
        def run():
            runs.append(name)
            outcome = outcomes[sum(r == name for r in runs) - 1]
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return Part(name, run)

    parts = [
        part("good", {"s": 1.5}),
        part("mended", RuntimeError("no memory"), {"ok": True}),
        part("bad", *[{"ok": False}] * 2),
    ]
    context = Context(tmp_path)
    assert not run_parts(9, parts, context)
    assert not run_parts(9, parts, context)
    assert runs == ["good", "mended", "bad", "mended", "bad"]
    assert [row["part"] for row in results(tmp_path, 9)] == ["good", "mended", "bad", "mended"]
    assert "no memory" in results(tmp_path, 9)[1]["reason"]["error"]
    assert "(from " in capsys.readouterr().out


def test_a_wrong_kernel_is_found(monkeypatch):
    """An error of one result in one head is above what is allowed."""
    shape = correctness.shapes(tiny=True)[0]
    right = correctness.all_passes

    def wrong(name, shape):
        def run(x):
            out = right("xla", shape)(x)
            if name == "pallas_triton":
                out["tangent"] = out["tangent"].at[1, 5, 2].multiply(1.001)
            return out

        return run

    monkeypatch.setattr(correctness, "all_passes", wrong)
    found = correctness.kernels(shape, "float32")
    assert found["to"] > 1 >= found["o"]
    assert not found["ok"]


def test_without_a_gpu_only_the_toy_size_runs(capsys):
    if jax.devices()[0].platform == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        main(["--stage", "1"])
    assert "--tiny" in capsys.readouterr().err
