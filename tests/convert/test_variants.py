"""Networks of Wan's family that are not read are called by their names."""

import numpy as np
import pytest

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.commands import main
from rcm_jax.convert.dialects import DIFFUSERS_DIT
from rcm_jax.convert.dit import to_wan
from rcm_jax.convert.tensors import Tensor
from rcm_jax.convert.variants import VARIANTS
from rcm_jax.wan.config import DiTConfig
from tests.convert.tiny import T2V, random_params, save, wan_arrays
from tests.test_entry_points import fails
from tests.wan.tiny import I2V

# a name that a published file has (ComfyUI tells most of them by these)
NAMES = {
    "vace_patch_embedding.weight": "VACE",
    "vace_blocks.0.before_proj.weight": "VACE",
    "casual_audio_encoder.encoder.final_linear.weight": "Wan2.2-S2V",
    "trainable_cond_mask.weight": "Wan2.2-S2V",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Wan2.2-Animate",
    "pose_patch_embedding.weight": "Wan2.2-Animate",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "blocks.0.audio_cross_attn.q_linear.weight": "MultiTalk or InfiniteTalk",
    "patch_embedding_pose.weight": "SCAIL",
    "control_adapter.conv.weight": "Fun-Control-Camera",
    "ref_conv.weight": "Fun-Control",
    "img_emb.emb_pos": "Wan2.1-FLF2V",
    "fps_embedding.weight": "SkyReels-V2-DF",
    "blocks.0.cam_encoder.weight": "ReCamMaster",
}


def test_every_variant_has_a_case():
    assert set(NAMES.values()) == {variant.name for variant in VARIANTS}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_told_by_a_name(tmp_path, name, prefix):
    path = save(tmp_path / "x.safetensors", wan_arrays() | {name: np.zeros(3, np.float32)}, prefix)
    with pytest.raises(ValueError, match=f"^{path}: it is {NAMES[name]}, which ") as told:
        open_checkpoint(path, num_heads=4)
    assert "\n" not in str(told.value)
    assert "is not supported; of its family can be read " in str(told.value)


def of_channels(into: int, out: int) -> dict[str, np.ndarray]:
    config = DiTConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=1, in_channels=into, out_channels=out, freq_dim=16,
                       text_dim=24)  # fmt: skip
    return to_wan(random_params(config), config)


@pytest.mark.parametrize(
    ("into", "out", "name"),
    [
        (48, 16, "Fun-Control"),
        (52, 16, "Wan2.2-Fun-Control"),
        (32, 16, "Fun-Control-Camera"),
        (148, 48, "Wan2.2-Fun-Control"),
        (100, 48, "Wan2.2-Fun-5B-InP"),
    ],
)
def test_told_by_its_channels(tmp_path, into, out, name):
    path = save(tmp_path / "x.safetensors", of_channels(into, out))
    with pytest.raises(ValueError, match=rf"it is {name}, .*\({into} channels in, {out} out\)"):
        open_checkpoint(path, num_heads=2)


@pytest.mark.parametrize("config", [T2V, I2V], ids=["t2v", "i2v"])
def test_what_has_wans_own_tensors_is_read(tmp_path, config):
    """Fine-tunes, and Fun-InP, which is I2V."""
    found = open_checkpoint(save(tmp_path / "x.pt", to_wan(random_params(config), config)), num_heads=config.num_heads)
    assert found.config == config
    assert open_checkpoint(save(tmp_path / "y.pt", of_channels(48, 48)), num_heads=2).config.in_channels == 48


def test_diffusers_names(tmp_path):
    plain = {name: Tensor.of(x) for name, x in wan_arrays().items()}
    theirs = {name: t.read() for name, t in DIFFUSERS_DIT.from_wan(plain).items()}
    theirs["vace_blocks.0.attn1.to_q.weight"] = np.zeros(3, np.float32)
    path = save(tmp_path / "x.safetensors", theirs, config={"_class_name": "WanVACETransformer3DModel"})
    fails(main, [str(path), str(tmp_path / "o.safetensors")], "it is VACE", "(vace_blocks)")
    assert not (tmp_path / "o.safetensors").exists()


def test_inspect_names_it(tmp_path, capsys):
    module = {"vace_blocks.0.before_proj.weight": np.zeros(3, np.float32)}  # as some have it, without its base
    main(["inspect", str(save(tmp_path / "x.safetensors", module))])
    assert "x.safetensors: it is VACE, which is steered by videos" in capsys.readouterr().out
