"""Differences and LoRA files added to a base, against the same sums over whole matrices."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rcm_jax.convert import commands
from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.dialects import DIFFUSERS_DIT
from rcm_jax.convert.lora import FORMS, read_lora, write_lora
from rcm_jax.convert.merge import add_difference, add_lora
from rcm_jax.wan.config import DiTConfig
from tests.convert.tiny import T2V, save, wan_arrays


def opened(path, arrays, prefix=""):
    return open_checkpoint(save(path, arrays, prefix), num_heads=4)


def test_base_plus_scaled_difference(tmp_path):
    base, student, reference = (wan_arrays(seed=seed) for seed in range(3))
    linear = student | {"patch_embedding.weight": student["patch_embedding.weight"].reshape(48, -1)}
    merged = add_difference(
        opened(tmp_path / "base.pt", {k: v.astype(ml_dtypes.bfloat16) for k, v in base.items()}),
        opened(tmp_path / "student.pt", linear, "net."),
        opened(tmp_path / "reference.safetensors", DIFFUSERS_DIT.from_wan(reference)),
        scale=0.5,
    )
    for name, tensor in merged.wan().items():
        rounded = base[name].astype(ml_dtypes.bfloat16).astype(np.float32)
        expected = rounded + np.float32(0.5) * (student[name] - reference[name])
        np.testing.assert_array_equal(tensor.read(), expected.astype(ml_dtypes.bfloat16), name)


def test_a_base_of_another_shape_needs_to_be_told_what_stays(tmp_path):
    wider = DiTConfig(**{**T2V.__dict__, "in_channels": 9})
    base = opened(tmp_path / "base.pt", wan_arrays(wider))
    student, reference = (opened(tmp_path / f"{i}.pt", wan_arrays(seed=i)) for i in (1, 2))
    with pytest.raises(ValueError, match="networks differ") as error:
        add_difference(base, student, reference)
    assert "patch_embedding.weight: base (48, 9, 1, 2, 2), student (48, 4, 1, 2, 2)" in str(error.value)
    assert str(error.value).count("\n") == 1
    merged = add_difference(base, student, reference, keep="patch_embedding").wan()
    np.testing.assert_array_equal(merged["patch_embedding.bias"].read(), wan_arrays(wider)["patch_embedding.bias"])
    with pytest.raises(ValueError, match="--keep 'patches' matches no tensor"):
        add_difference(base, student, reference, keep="patches")


def lora(rank=3):
    """Two changed layers: {Wan2.1 module: (up, down)}."""
    rng = np.random.default_rng(5)
    shapes = {"blocks.1.self_attn.o": (48, 48), "blocks.2.ffn.0": (64, 48)}
    return {
        module: tuple(rng.normal(size=s).astype(np.float32) for s in ((out, rank), (rank, into)))
        for module, (out, into) in shapes.items()
    }


def as_diffusers(alpha):
    out = {}
    for module, (up, down) in lora().items():
        theirs = DIFFUSERS_DIT.from_wan({module: None}).popitem()[0]
        out |= {f"transformer.{theirs}.lora_A.weight": down, f"transformer.{theirs}.lora_B.weight": up}
    return out, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha, "transformer.r": 3})}


def halves(name, up, down, alpha):
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": np.array(alpha)}


def as_comfyui(alpha):
    parts = [halves(f"diffusion_model.{module}", *pair, alpha) for module, pair in lora().items()]
    return parts[0] | parts[1], {}


def as_kohya(alpha):
    parts = [halves(f"lora_unet_{module.replace('.', '_')}", *pair, alpha) for module, pair in lora().items()]
    return parts[0] | parts[1], {}


@pytest.mark.parametrize("form", [as_diffusers, as_comfyui, as_kohya])
def test_lora_of_every_naming(tmp_path, form):
    arrays, metadata = form(6.0)
    save_file(arrays, tmp_path / "lora.safetensors", metadata)
    base = wan_arrays()
    merged = add_lora(opened(tmp_path / "base.pt", base), tmp_path / "lora.safetensors", scale=0.25).wan()
    changed = {f"{module}.weight": np.float32(0.25 * 6.0 / 3) * (up @ down) for module, (up, down) in lora().items()}
    for name, tensor in merged.items():
        expected = base[name] + changed[name] if name in changed else base[name]
        np.testing.assert_allclose(tensor.read(), expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_without_alpha_the_product_counts_as_it_is_and_biases_may_come_along(tmp_path):
    module, (up, down) = next(iter(lora().items()))
    bias = np.arange(48, dtype=np.float32)
    norm = np.ones(48, np.float32)
    arrays = {
        f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": up,
        f"diffusion_model.{module}.diff_b": bias, "diffusion_model.blocks.0.norm3.diff": norm,
    }  # fmt: skip
    base = wan_arrays()
    merged = add_lora(opened(tmp_path / "b.pt", base), save(tmp_path / "l.safetensors", arrays)).wan()
    np.testing.assert_allclose(merged[f"{module}.weight"].read(), base[f"{module}.weight"] + up @ down, rtol=1e-5)
    np.testing.assert_array_equal(merged[f"{module}.bias"].read(), base[f"{module}.bias"] + bias)
    np.testing.assert_array_equal(merged["blocks.0.norm3.weight"].read(), base["blocks.0.norm3.weight"] + norm)


def test_what_does_not_fit_is_listed(tmp_path):
    name = "diffusion_model.blocks.1.self_attn.q"
    arrays = {
        f"{name}.lora_down.weight": np.zeros((3, 48)), f"{name}.lora_up.weight": np.zeros((47, 3)),
        "diffusion_model.blocks.0.self_attn.k.lora_up.weight": np.zeros((48, 3)),
        "diffusion_model.blocks.9.ffn.0.lora_up.weight": np.zeros((64, 3)),
        "diffusion_model.blocks.0.self_attn.v.lora_unheard_of": np.zeros(48),
        "diffusion_model.blocks.0.self_attn.v.diff_b": np.zeros(7),
    }  # fmt: skip
    base = opened(tmp_path / "b.pt", wan_arrays())
    with pytest.raises(ValueError, match="does not fit") as error:
        add_lora(base, save(tmp_path / "l.safetensors", arrays))
    for words in (
        "blocks.1.self_attn.q: up (47, 3) times down (3, 48) is not (48, 48)",
        "blocks.0.self_attn.k has ['up'], and a LoRA needs up and down",
        "diffusion_model.blocks.9.ffn.0.lora_up.weight (64, 3) is not known",
        "lora_unheard_of (48,) is not known",
        "blocks.0.self_attn.v.bias: (7,) in the LoRA, (48,) in the base",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="it has no LoRA"):
        add_lora(base, save(tmp_path / "empty.safetensors", {}))
    dora = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
    save_file({f"{name}.diff_b": np.zeros(48)}, tmp_path / "d.safetensors", dora)
    with pytest.raises(ValueError, match="DoRA"):
        add_lora(base, tmp_path / "d.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_goes_from_every_form_to_every_other(tmp_path, form):
    """Each layer with a rank of its own too: then alpha is in the factors where diffusers' form has one for all."""
    arrays, metadata = as_kohya(6.0)
    save_file(arrays, tmp_path / "lora.safetensors", metadata)
    base = opened(tmp_path / "base.pt", wan_arrays())
    want = add_lora(base, tmp_path / "lora.safetensors").wan()
    commands.main(["lora", str(tmp_path / "lora.safetensors"), str(tmp_path / "other.safetensors"), "--form", form])
    for name, tensor in add_lora(base, tmp_path / "other.safetensors").wan().items():
        np.testing.assert_array_equal(tensor.read(), want[name].read(), err_msg=name)

    longer = {
        name: np.concatenate([x, x], axis=int("up" in name)) for name, x in arrays.items() if "ffn" in name and x.ndim
    }
    save_file(arrays | longer, tmp_path / "mixed.safetensors")
    want = add_lora(base, tmp_path / "mixed.safetensors").wan()
    write_lora(read_lora(tmp_path / "mixed.safetensors"), tmp_path / "again.safetensors", form)
    for name, tensor in add_lora(base, tmp_path / "again.safetensors").wan().items():
        np.testing.assert_allclose(tensor.read(), want[name].read(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_what_is_no_lora_of_factors_is_not_written(tmp_path):
    arrays = {"diffusion_model.blocks.0.norm3.diff": np.ones(48, np.float32)}
    with pytest.raises(ValueError, match=r"whole differences, which are not written: blocks.0.norm3: weight"):
        write_lora(read_lora(save(tmp_path / "l.safetensors", arrays)), tmp_path / "o.safetensors")
    with pytest.raises(ValueError, match=r"is no LoRA that is read here:\n  w \(2,\) is not known"):
        read_lora(save(tmp_path / "n.safetensors", {"w": np.zeros(2, np.float32)}))
    assert not (tmp_path / "o.safetensors").exists()


def test_a_sum_asked_for_in_float32_is_not_rounded_to_the_base(tmp_path):
    base = {name: x.astype(ml_dtypes.bfloat16) for name, x in wan_arrays().items()}
    paths = [str(save(tmp_path / "base.pt", base)), str(tmp_path / "sum.safetensors")]
    lora_file = str(save(tmp_path / "l.safetensors", as_comfyui(3.0)[0]))
    commands.main(["merge", *paths, "--lora", lora_file, "--num_heads", "4", "--dtype", "float32"])
    merged = open_checkpoint(paths[1]).wan()
    for module, (up, down) in lora().items():
        name = f"{module}.weight"
        np.testing.assert_allclose(merged[name].read(), base[name].astype(np.float32) + up @ down, rtol=1e-6, atol=1e-6)
