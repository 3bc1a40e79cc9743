"""LoRA files in every public form, against the same sums over whole matrices."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from rcm_jax.convert import commands
from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.lora import DOWN, OTHERS, UP
from rcm_jax.convert.merge import add_lora, add_loras, given_lora
from rcm_jax.errors import ArgumentError
from tests.convert.tiny import T2V, save, wan_arrays

MODULE, RANK = "blocks.1.self_attn.o", 3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


UP_HALF, DOWN_HALF = normal(48, RANK, seed=1), normal(RANK, 48, seed=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_checkpoint(save(tmp_path_factory.mktemp("base") / "base.pt", wan_arrays()), num_heads=4)


def merged(base, tmp_path, arrays, metadata=None, **how):
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, tmp_path / "lora.safetensors", metadata)
    return {name: t.read() for name, t in add_lora(base, tmp_path / "lora.safetensors", **how).wan().items()}


def changed(base, got):
    """What the LoRA changed: name -> difference."""
    before = {name: t.read() for name, t in base.wan().items()}
    return {name: x - before[name] for name, x in got.items() if (x != before[name]).any()}


def same_change(base, got, name, want):
    (found,) = changed(base, got).items()
    assert found[0] == name
    np.testing.assert_allclose(found[1], want, rtol=1e-4, atol=1e-5)


UNDERSCORES = MODULE.replace(".", "_")
NAMES = {
    "kohya and musubi": f"lora_unet_{UNDERSCORES}", "VideoX-Fun": f"lora_unet__{UNDERSCORES}",
    "ComfyUI": f"diffusion_model.{MODULE}", "ComfyUI, whole": f"model.diffusion_model.{MODULE}",
    "LightX2V, transformer": f"transformer.{MODULE}", "LightX2V, model": f"model.{MODULE}",
    "LightX2V, unet": f"unet.{MODULE}", "LightX2V, none": MODULE,
    "diffusers": "transformer.blocks.1.attn1.to_out.0", "PEFT": "base_model.model.blocks.1.attn1.to_out.0",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_of_every_tool(base, tmp_path, name):
    arrays = {f"{name}.lora_down.weight": DOWN_HALF, f"{name}.lora_up.weight": UP_HALF}
    same_change(base, merged(base, tmp_path, arrays), f"{MODULE}.weight", UP_HALF @ DOWN_HALF)


@pytest.mark.parametrize(("down", "up"), list(zip(DOWN, UP, strict=True)))
def test_halves_by_every_ending(base, tmp_path, down, up):
    arrays = {f"diffusion_model.{MODULE}{down}": DOWN_HALF, f"diffusion_model.{MODULE}{up}": UP_HALF}
    same_change(base, merged(base, tmp_path, arrays, scale=0.5), f"{MODULE}.weight", 0.5 * UP_HALF @ DOWN_HALF)


@pytest.mark.parametrize(
    ("alpha", "metadata", "scale"),
    [
        (None, {}, 1.0),
        (1.0, {}, 1 / RANK),  # musubi's default
        (6.0, {"transformer.lora_alpha": 99}, 2.0),  # a module's own comes first
        (None, {"transformer.lora_alpha": 6, "transformer.r": RANK}, 2.0),
    ],
)
def test_alpha_as_each_form_has_it(base, tmp_path, alpha, metadata, scale):
    arrays = {
        f"lora_unet_{UNDERSCORES}.lora_down.weight": DOWN_HALF,
        f"lora_unet_{UNDERSCORES}.lora_up.weight": UP_HALF,
    }
    if alpha is not None:
        arrays[f"lora_unet_{UNDERSCORES}.alpha"] = np.float32(alpha)
    told = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    got = merged(base, tmp_path, arrays, told)
    same_change(base, got, f"{MODULE}.weight", scale * UP_HALF @ DOWN_HALF)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("diffusion_model.blocks.0.diff_m", "blocks.0.modulation"),
        ("diffusion_model.blocks.0.modulation.diff", "blocks.0.modulation"),
        ("diffusion_model.head.diff_m", "head.modulation"),
        ("diffusion_model.blocks.2.norm3.diff", "blocks.2.norm3.weight"),
        ("diffusion_model.blocks.2.norm3.diff_b", "blocks.2.norm3.bias"),
        ("diffusion_model.patch_embedding.diff", "patch_embedding.weight"),
        ("transformer.proj_out.lora_B.bias", "head.head.bias"),
        ("lora_unet_blocks_1_diff_m", None),
        ("lora_unet_blocks_1.diff_m", "blocks.1.modulation"),
        ("lora_unet_time_projection_1.diff_b", "time_projection.1.bias"),
    ],
)
def test_differences_of_whole_parameters(base, tmp_path, key, name):
    shape = base.wan()[name or "blocks.1.modulation"].shape
    if name is None:
        with pytest.raises(ValueError, match=r"lora_unet_blocks_1_diff_m \(1, 6, 48\) is not known"):
            merged(base, tmp_path, {key: normal(*shape)})
    else:
        same_change(base, merged(base, tmp_path, {key: normal(*shape)}), name, normal(*shape))


def test_the_patch_embedding_is_a_convolution(base, tmp_path):
    shape = base.wan()["patch_embedding.weight"].shape
    up, down = normal(shape[0], RANK, 1, 1, 1), normal(RANK, *shape[1:], seed=3)
    name = "diffusion_model.patch_embedding"
    got = merged(base, tmp_path, {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down})
    want = np.einsum("orxyz,rcabd->ocabd", up, down)
    same_change(base, got, "patch_embedding.weight", want)
    with pytest.raises(ValueError, match=r"patch_embedding: up \(48, 3, 1, 1, 1\) times down \(3, 48\) is not"):
        merged(base, tmp_path, {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": DOWN_HALF})


@pytest.mark.parametrize(("ending", "kind"), OTHERS.items())
def test_other_kinds_are_refused_by_name(base, tmp_path, ending, kind):
    arrays = {f"diffusion_model.{MODULE}{ending}": DOWN_HALF, f"diffusion_model.{MODULE}.lora_up.weight": UP_HALF}
    with pytest.raises(ValueError, match=rf"is {kind} \(diffusion_model\.{MODULE}{ending}\), which is not read"):
        merged(base, tmp_path, arrays)


def image_lora():
    """Of an image-to-video network: what a text-to-video base lacks is in it."""
    arrays = {}
    for module in (MODULE, "blocks.0.cross_attn.k_img", "img_emb.proj.1"):
        arrays[f"diffusion_model.{module}.lora_up.weight"] = UP_HALF
        arrays[f"diffusion_model.{module}.lora_down.weight"] = DOWN_HALF
    return arrays


def test_what_the_base_lacks_may_be_skipped(base, tmp_path):
    with pytest.raises(ValueError, match="--skip PATTERN leaves layers out") as error:
        merged(base, tmp_path, image_lora())
    assert str(error.value).count("is not known") == 4
    with pytest.warns(UserWarning, match="2 layers are left out: blocks.0.cross_attn.k_img, img_emb.proj.1"):
        got = merged(base, tmp_path, image_lora(), skip="k_img|v_img|img_emb")
    same_change(base, got, f"{MODULE}.weight", UP_HALF @ DOWN_HALF)
    with pytest.raises(ValueError, match="--skip 'audio' matches no layer"):
        merged(base, tmp_path, image_lora(), skip="audio")
    wider = open_checkpoint(
        save(tmp_path / "i2v.pt", wan_arrays(dataclasses.replace(T2V, in_channels=9, image_dim=48))), num_heads=4
    )
    assert len(changed(wider, merged(wider, tmp_path, image_lora()))) == 3


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 6}, 2),
        ({"lora_alpha": 6, "alpha_pattern": {"to_out.0": 12}}, 4),
        ({"lora_alpha": 6, "alpha_pattern": {r"blocks\.0\.attn1\.to_out\.0": 12}}, 2),
        ({}, 1),
    ],
)
def test_pefts_own_file_has_its_alpha_beside(base, tmp_path, settings, scale, as_folder):
    name = "base_model.model.blocks.1.attn1.to_out.0"
    file = save(tmp_path / "adapter_model.safetensors", {f"{name}.lora_A.weight": DOWN_HALF,
                                                        f"{name}.lora_B.weight": UP_HALF})  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    got = {n: t.read() for n, t in add_lora(base, tmp_path if as_folder else file).wan().items()}
    same_change(base, got, f"{MODULE}.weight", scale * UP_HALF @ DOWN_HALF)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(ValueError, match="is a DoRA or rank-stabilised LoRA"):
        add_lora(base, file)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is not JSON"):
        add_lora(base, file)


def test_several_with_strengths(base, tmp_path):
    arrays = {f"{MODULE}.lora_up.weight": UP_HALF, f"{MODULE}.lora_down.weight": DOWN_HALF}
    one, other = (save(tmp_path / f"{name}.safetensors", arrays) for name in ("one", "other"))
    given = [given_lora(f"{one}:0.5"), given_lora(f"{other}:-2e-1")]
    got = {name: t.read() for name, t in add_loras(base, given).wan().items()}
    same_change(base, got, f"{MODULE}.weight", 0.3 * UP_HALF @ DOWN_HALF)
    out = tmp_path / "sum.safetensors"
    flags = ["--lora", f"{one}:0.5", "--lora", f"{other}:-2e-1", "--num_heads", "4"]
    commands.main(["merge", str(base.path), str(out), *flags])
    written = open_checkpoint(out).wan()
    for name, x in got.items():
        np.testing.assert_array_equal(written[name].read(), x, err_msg=name)


@pytest.mark.parametrize(
    ("text", "strength"), [("a.safetensors", 1), ("a.safetensors:0.8", 0.8), ("a.safetensors:1e-1", 0.1)]
)
def test_how_a_strength_is_given(tmp_path, monkeypatch, text, strength):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    assert given_lora(text) == ((tmp_path / "a.safetensors").relative_to(tmp_path), strength)
    with pytest.raises((ArgumentError, FileNotFoundError), match="b.safetensors"):
        given_lora("b.safetensors:0.5").path.stat()
