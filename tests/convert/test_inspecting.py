"""What the command says of a file, and of two."""

import numpy as np
import pytest

from rcm_jax.convert.commands import main
from tests.convert.test_merge import as_kohya
from tests.convert.tiny import HEADS, save, wan_arrays
from tests.test_entry_points import fails


def said(capsys, *argv):
    main([*map(str, argv)])
    return capsys.readouterr().out


def test_a_network_and_how_it_is_sampled(tmp_path, capsys):
    path = save(tmp_path / "x.pt", wan_arrays(), "net.")
    out = said(capsys, "inspect", path, *HEADS, "--tensors")
    assert out.startswith(f"{path}: diffusion transformer")
    assert "sampled as a student: 1 to 4 steps from sigma 80, no guidance, time rounded to bfloat16" not in out
    assert "sampled as a student: 1 to 4 steps" in out  # named as rCM's
    assert "all frames at once" in out
    assert "float32: " in out
    assert "blocks.2.ffn.0.weight (64, 48) float32" in out
    assert "sampled as a teacher: guidance" in said(capsys, "inspect", path, *HEADS, "--kind", "teacher")


def test_a_lora(tmp_path, capsys):
    path = save(tmp_path / "l.safetensors", as_kohya(3.0)[0])
    out = said(capsys, "inspect", path)
    assert "LoRA of 2 layers, rank 3" in out
    assert "of blocks.ffn (1), blocks.self_attn.o (1)" in out


def test_what_is_neither(tmp_path):
    fails(main, ["inspect", str(save(tmp_path / "x.safetensors", {"a": np.ones(3)}))], "holds no network known here")


def test_the_largest_differences_come_first(tmp_path, capsys):
    arrays = wan_arrays()
    one = save(tmp_path / "one.safetensors", arrays)
    changed = dict(arrays)
    changed["blocks.0.ffn.0.weight"] = arrays["blocks.0.ffn.0.weight"] * np.float32(1.5)
    changed["head.head.bias"] = arrays["head.head.bias"] + np.float32(1e-3)
    other = save(tmp_path / "other.pt", changed, "generator_ema.")
    lines = said(capsys, "diff", one, other, *HEADS).splitlines()
    assert lines[2] == "2 tensors differ"
    assert [line.split()[0] for line in lines[4:]] == ["blocks.0.ffn.0.weight", "head.head.bias"]
    assert lines[4].split()[1] == "5.00e-01"
    assert "; the 1 that differ most" in said(capsys, "diff", one, other, "--most", 1, *HEADS)
    assert said(capsys, "diff", one, one, *HEADS).splitlines()[-1] == "the same numbers"


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_finite_differs_most(tmp_path, capsys, broken):
    arrays = wan_arrays()
    one = save(tmp_path / "one.safetensors", arrays)
    bias = arrays["head.head.bias"].copy()
    bias[0] = broken
    other = save(tmp_path / "other.safetensors", arrays | {"head.head.bias": bias})
    assert "head.head.bias       inf" in said(capsys, "diff", one, other, *HEADS)
