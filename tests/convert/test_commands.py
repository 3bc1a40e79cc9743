"""The command: what it makes, what it says, and what it says to bad input."""

import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rcm_jax.convert.commands import main
from rcm_jax.model_file import load_model, read_info
from tests.convert.test_merge import as_comfyui
from tests.convert.test_torch_io import Evil, zip_with
from tests.convert.tiny import HEADS, T2V, random_params, save, wan_arrays
from tests.test_entry_points import fails


@pytest.fixture
def rcm_file(tmp_path):
    arrays = wan_arrays()
    arrays["patch_embedding.weight"] = arrays["patch_embedding.weight"].reshape(48, -1)
    return str(save(tmp_path / "rcm.pt", arrays, "net."))


def test_converts_exports_and_merges(tmp_path, rcm_file, capsys):
    ours, theirs, again = str(tmp_path / "m.safetensors"), str(tmp_path / "d"), str(tmp_path / "again")
    main([rcm_file, ours, *HEADS])
    assert "diffusion transformer" in capsys.readouterr().out
    params, info = load_model(ours)
    jax.tree.map(np.testing.assert_array_equal, params, random_params(T2V))
    assert (info.kind, info.world, info.model.round_time_to) == ("student", "wan", "bfloat16")
    main(["export", ours, theirs, "--to", "diffusers"])
    main([theirs, again, "--format", "orbax", "--dtype", "bfloat16", "--kind", "student"])
    assert read_info(again).model.round_time_to is None
    lora = str(save(tmp_path / "l.safetensors", as_comfyui(3)[0]))
    merged = str(tmp_path / "merged.pth")
    main(["merge", theirs, merged, "--student", ours, "--reference", rcm_file, "--lora", lora, *HEADS, "--to", "wan"])
    main([merged, ours, *HEADS, "--overwrite"])
    assert read_info(ours).kind == "teacher"  # a Wan2.1 file does not tell
    changed, _ = load_model(ours)
    assert not np.array_equal(changed["blocks"]["ffn_in"]["kernel"], params["blocks"]["ffn_in"]["kernel"])
    np.testing.assert_array_equal(changed["blocks"]["ffn_out"]["kernel"], params["blocks"]["ffn_out"]["kernel"])


def test_an_output_that_cannot_be_written_is_known_before_anything_is_read(tmp_path, rcm_file):
    (tmp_path / "file").write_text("in the way")
    for command in ([], ["export"], ["merge"]):
        out = str(tmp_path / "file" / "out.safetensors")
        fails(main, [*command, "no-such-source", out], f"cannot write {tmp_path}/file: {tmp_path}/file is a file")
    fails(main, ["no-such-source", "/proc/new/out.safetensors"], "nothing can be written in /proc/new")


def test_a_merged_student_is_sampled_like_the_student(tmp_path, rcm_file):
    base = str(save(tmp_path / "base.pt", wan_arrays(seed=1)))
    out = str(tmp_path / "m.safetensors")
    main(["merge", base, out, "--student", rcm_file, "--reference", base, *HEADS])
    assert (read_info(out).kind, read_info(out).model.round_time_to) == ("student", "bfloat16")


def test_dry_run_prints_the_mapping_and_writes_nothing(tmp_path, rcm_file, capsys):
    before = sorted(tmp_path.iterdir())
    main([rcm_file, str(tmp_path / "out.safetensors"), *HEADS, "--dry_run", "--dtype", "bfloat16"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 96
    assert "net.blocks.2.ffn.0.weight (64, 48) float32 -> blocks/ffn_in/kernel[2] (48, 64) bfloat16" in lines
    assert "net.head.head.bias (16,) float32 -> head/out/bias (16,) float32" in lines
    main(["export", rcm_file, str(tmp_path / "out"), *HEADS, "--dry_run", "--to", "diffusers"])
    lines = capsys.readouterr().out.splitlines()
    assert "net.head.modulation -> scale_shift_table (1, 2, 48) float32" in lines
    assert sorted(tmp_path.iterdir()) == before


def test_bad_input_is_one_message_and_changes_nothing(tmp_path, rcm_file):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(Path(rcm_file).read_bytes()[:5000])
    text = tmp_path / "vae.pth"
    text.write_text("not weights")
    canary = tmp_path / "canary"
    evil = zip_with(tmp_path / "evil.pt", pickle.dumps({"a": Evil(canary)}, 2))
    for source, flags, words in [
        (rcm_file, [], ["dim=48", "--num_heads"]),
        (out, [], [f"{out} is what is read ({out}): give another name"]),
        (cut, [], [str(cut), "not a whole PyTorch file"]),
        (text, [], [str(text), "neither a safetensors nor a PyTorch file"]),
        (evil, [], [str(evil), "refused", "posix.system"]),
        (tmp_path / "nowhere", [], ["no file or folder at"]),
        (rcm_file, [*HEADS, "--model", "t2v-14B"], ["not of the size of t2v-14B", "dim=48 instead of 5120"]),
        (rcm_file, [*HEADS, "--entry", "net_ema"], ["no network under 'net_ema'", "net"]),
    ]:
        fails(main, [str(source), str(out), *flags, "--overwrite"], *words)
    fails(main, [rcm_file, str(out), *HEADS], f"{out} is there already", "--overwrite")
    fails(main, [rcm_file, str(out / "deep.safetensors"), *HEADS], f"{out} is a file; name a folder")
    fails(main, [rcm_file, str(tmp_path / "o.mp4"), *HEADS], "the safetensors form is a .safetensors file")
    for added in ("--lora", "--student"):
        merge = ["merge", rcm_file, str(out), added, str(out), "--reference", rcm_file, "--overwrite"]
        fails(main, merge, f"{out} is what is read")
    assert out.read_text() == "mine"
    assert not canary.exists()
    merge = ["merge", rcm_file, str(out), *HEADS, "--student", rcm_file, "--overwrite"]
    fails(main, merge, "--student and --reference together")
    with pytest.raises(SystemExit):
        main([rcm_file, str(out), "--model", "13B"])


def test_help_is_there():
    for command in ([], ["export"], ["merge"]):
        result = subprocess.run(
            [sys.executable, "-m", "rcm_jax.convert", *command, "--help"], capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0
        assert "python -m rcm_jax.convert" in result.stdout
        assert "generator_ema" in result.stdout
