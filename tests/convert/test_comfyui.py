"""Files as ComfyUI repackages them."""

import json

import ml_dtypes
import numpy as np
import pytest

from rcm_jax.convert import commands
from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.dialects import TRANSFORMERS_UMT5
from rcm_jax.convert.files import open_weights
from rcm_jax.convert.tensors import Tensor
from rcm_jax.convert.torch_io import read_torch, write_torch
from rcm_jax.tensor_stream import write_safetensors
from rcm_jax.worlds.wan.files import open_text
from tests.convert.tiny import wan_arrays
from tests.wan.tiny import UMT5, arrays, write_sentencepiece

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
LINEAR = "blocks.1.ffn.0"


def write(path, arrays, metadata=None):
    write_safetensors(path, {n: Tensor.of(np.asarray(x)) for n, x in arrays.items()}, metadata or {}, lambda _: None)
    return path


def scaled(kind=E4M3, scale=".scale_weight", hint=".scale_input"):
    """A network with one layer of every block in float8, and what that of a block is then."""
    own, rng, want = wan_arrays(), np.random.default_rng(0), {}
    for i in range(3):
        name, number = f"blocks.{i}.ffn.0", np.float32(0.00123 * (i + 1))
        stored = rng.normal(size=own[f"{name}.weight"].shape).astype(np.float32).astype(kind)
        own |= {f"{name}.weight": stored, f"{name}{scale}": number, f"{name}{hint}": np.float32(3)}
        want[name] = stored.astype(np.float32) * number
    return own, want[LINEAR]


@pytest.mark.parametrize(
    ("kind", "scale", "hint", "marks", "metadata"),
    [
        (E4M3, ".scale_weight", ".scale_input", {"scaled_fp8": np.zeros(2, E4M3)}, {}),
        (E4M3, ".scale_weight", ".scale_input", {"scaled_fp8": np.zeros(0, np.float32)}, {}),
        (E5M2, ".scale_weight", ".scale_input", {"scaled_fp8": np.zeros(2, E5M2)}, {}),
        (E4M3, ".weight_scale", ".input_scale", {
            f"{LINEAR}.comfy_quant": np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)}, {}),
        (E4M3, ".weight_scale", ".input_scale", {}, {
            "_quantization_metadata": json.dumps({"layers": {LINEAR: {"format": "float8_e4m3fn"}}})}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scales_are_multiplied_in(tmp_path, kind, scale, hint, marks, metadata, prefix):
    own, want = scaled(kind, scale, hint)
    path = write(tmp_path / "x.safetensors", {prefix + n: x for n, x in (own | marks).items()}, metadata)
    found = open_checkpoint(path, num_heads=4)
    got = found.wan()[f"{LINEAR}.weight"]
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.read(), want.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(found.wan("float32")[f"{LINEAR}.weight"].read(), want)
    np.testing.assert_array_equal(found.wan()["blocks.0.ffn.2.weight"].read(), own["blocks.0.ffn.2.weight"])
    commands.main([str(path), str(tmp_path / "ours.safetensors"), "--num_heads", "4"])
    again = open_checkpoint(tmp_path / "ours.safetensors").wan()[f"{LINEAR}.weight"]
    np.testing.assert_array_equal(again.read(), want.astype(ml_dtypes.bfloat16))


def test_float8_without_scales_is_what_it_is(tmp_path):
    own, _ = scaled()
    plain = {name: x for name, x in own.items() if not name.endswith((".scale_weight", ".scale_input"))}
    got = open_checkpoint(write(tmp_path / "x.safetensors", plain), num_heads=4).wan()[f"{LINEAR}.weight"]
    assert got.dtype == E4M3
    out = tmp_path / "back.pth"  # both ways, to the bit
    commands.main(["export", str(tmp_path / "x.safetensors"), str(out), "--num_heads", "4"])
    back = open_checkpoint(out, num_heads=4).wan()[f"{LINEAR}.weight"]
    assert back.dtype == E4M3
    np.testing.assert_array_equal(back.read().view(np.uint8), plain[f"{LINEAR}.weight"].view(np.uint8))


@pytest.mark.parametrize(
    ("more", "metadata", "message"),
    [
        ({"blocks.9.ffn.0.scale_weight": np.float32(1)}, {}, r"blocks.9.ffn.0.scale_weight \(\) is no scale"),
        ({f"{LINEAR}.scale_weight": np.ones(64, np.float32)}, {}, r"scale_weight \(64,\) is no scale of one number"),
        ({f"{LINEAR}.comfy_quant": np.frombuffer(b'{"format": "nvfp4"}', np.uint8)}, {}, "is quantised as nvfp4; read"),
        ({f"{LINEAR}.comfy_quant": np.frombuffer(b"\xff\x00", np.uint8)}, {}, "is not the JSON of a format"),
        ({}, {"_quantization_metadata": '{"layers": {"x": {"format": "mxfp8"}}}'}, "x is quantised as mxfp8"),
    ],
)
def test_what_is_no_scaled_file_is_refused(tmp_path, more, metadata, message):
    path = write(tmp_path / "x.safetensors", scaled()[0] | more, metadata)
    with pytest.raises(ValueError, match=message):
        open_weights(path)


def test_a_scale_that_is_not_finite_is_no_weight(tmp_path):
    own = scaled()[0] | {f"{LINEAR}.scale_weight": np.float32("nan")}
    found = open_checkpoint(write(tmp_path / "x.safetensors", own), num_heads=4)
    with pytest.raises(ValueError, match=f"{LINEAR}.scale_weight is nan"):
        found.wan()[f"{LINEAR}.weight"].read()


def test_umt5_with_its_tokenizer(tmp_path):
    names = TRANSFORMERS_UMT5.from_wan(arrays("umt5", UMT5, 0))
    model = write_sentencepiece(tmp_path / "elsewhere").read_bytes()
    name = "encoder.block.0.layer.0.SelfAttention.q"
    names[f"{name}.weight"] = names[f"{name}.weight"].astype(E4M3)
    more = {f"{name}.scale_weight": np.float32(0.5), "scaled_fp8": np.zeros(2, E4M3),
            "spiece_model": np.frombuffer(model, np.uint8)}  # fmt: skip
    path = write(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", names | more)
    encoder, tokenizer = open_text(str(path))
    assert "with its tokenizer" in str(encoder)
    ids, mask = tokenizer(["a cat"])
    assert ids[0, mask[0].sum() - 1] == 1
    _, named = open_text(str(path), str(tmp_path / "elsewhere"))
    np.testing.assert_array_equal(named(["a cat"])[0], ids)
    commands.main([str(path), str(tmp_path / "umt5.safetensors")])  # strict: nothing else is in the file
    bad = write(tmp_path / "bad.safetensors", names | more | {"spiece_model": np.zeros(9, np.uint8)})
    with pytest.raises(ValueError, match="bad.safetensors is not a sentencepiece model"):
        open_text(str(bad))


def test_pytorch_s_own_files(tmp_path):
    import argparse

    torch = pytest.importorskip("torch")
    saved = {"model": {n: torch.from_numpy(x) for n, x in wan_arrays().items()}, "args": argparse.Namespace(lr=1.0),
             "loss": np.float64(2)}  # fmt: skip
    torch.save(saved, tmp_path / "x.pt")
    found = open_checkpoint(tmp_path / "x.pt", num_heads=4)
    assert found.objects["args"] == "argparse.Namespace"
    assert "args (argparse.Namespace)" in str(found)
    small = {name: torch.from_numpy(x).to(torch.float8_e4m3fn) for name, x in list(wan_arrays().items())[:3]}
    torch.save(small, tmp_path / "theirs.pt")
    write_torch(tmp_path / "ours.pt", read_torch(tmp_path / "theirs.pt"), lambda _: None)
    for name, x in torch.load(tmp_path / "ours.pt", weights_only=True).items():
        assert torch.equal(x.view(torch.uint8), small[name].view(torch.uint8))
