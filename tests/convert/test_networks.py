"""The networks around the DiT are told apart, converted and taken back like it."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rcm_jax.convert import clip, tiny_vae, umt5, vae
from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.export import export, their_tensors
from rcm_jax.convert.files import open_weights
from rcm_jax.convert.networks import NETWORKS, with_dtype
from rcm_jax.convert.output import write_model
from rcm_jax.convert.tensors import Tensor
from rcm_jax.model_file import ModelInfo, load_model
from rcm_jax.wan.config import CLIPConfig, TinyVAEConfig, UMT5Config, VAEConfig
from rcm_jax.wan.networks import abstract_network
from tests.convert.tiny import T2V, save, wan_arrays

TABLES = {"vae": vae, "tiny_vae": tiny_vae, "umt5": umt5, "clip": clip}
CONFIGS = {
    "vae": VAEConfig(
        dim=4, z_dim=3, dim_mult=(1, 2, 2), num_res_blocks=2, temporal_downsample=(False, True), mean=(0.0,) * 3,
        std=(1.0,) * 3,
    ),
    "tiny_vae": TinyVAEConfig((8, 6, 5, 4), 7, 3),
    "umt5": UMT5Config(
        vocabulary=50, dim=24, attention_dim=16, ffn_dim=32, num_heads=2, num_layers=3, dtype="bfloat16"
    ),
    "clip": CLIPConfig(dim=16, num_heads=2, num_layers=2, image_size=12, patch_size=4),
}  # fmt: skip
LIBRARY = {"vae": "diffusers", "umt5": "transformers"}


@functools.cache
def params(name):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_network(CONFIGS[name]))


@functools.cache
def arrays(name):
    """As in the published file."""
    out = TABLES[name].to_wan(params(name), CONFIGS[name])
    if name == "clip":
        besides = {"visual.transformer.2.norm1.bias": 16, "visual.head": 5, "textual.x": 3, "log_scale": 1}
        out |= {key: np.zeros(size, np.float32) for key, size in besides.items()}
    return out


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_published_file(tmp_path, name, suffix):
    source = open_checkpoint(save(tmp_path / f"x{suffix}", arrays(name)), num_heads=2)
    assert (source.network.name, source.dialect, source.config) == (name, "wan", CONFIGS[name])
    write_model(tmp_path / "ours", source.ours(), ModelInfo(source.config, name, "wan"))
    loaded, info = load_model(tmp_path / "ours")
    assert (info.network, info.model) == (name, CONFIGS[name])
    jax.tree.map(np.testing.assert_array_equal, loaded, params(name))


@pytest.mark.parametrize("target", ["wan", "library"])
@pytest.mark.parametrize("name", LIBRARY)
def test_round_trip_is_bit_exact(tmp_path, name, target):
    source = open_checkpoint(save(tmp_path / "x.pt", arrays(name)))
    info = ModelInfo(source.config, name, "wan")
    write_model(tmp_path / "ours", source.ours(), info)
    target, path = (LIBRARY[name], tmp_path / "d") if target == "library" else (target, tmp_path / "y.safetensors")
    export(open_checkpoint(tmp_path / "ours"), path, target)
    if target == "wan":
        back = open_weights(path).groups[""]
        assert back.keys() == arrays(name).keys()
        assert all(np.array_equal(back[key].read(), array) for key, array in arrays(name).items())
    else:
        assert not set(open_weights(path).groups[""]) & set(arrays(name))
    again = open_checkpoint(path)
    assert (again.dialect, again.config) == (target, source.config)
    write_model(tmp_path / "again", again.ours(), info)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "ours").read_bytes()


def test_the_tiny_autoencoder_goes_back_by_its_own_names_alone(tmp_path):
    source = open_checkpoint(save(tmp_path / "x.pth", arrays("tiny_vae")))
    assert "tiny video autoencoder" in str(source)
    assert "TAEHV names" in str(source)
    write_model(tmp_path / "ours", source.ours(), ModelInfo(source.config, "tiny_vae", "wan"))
    export(open_checkpoint(tmp_path / "ours"), tmp_path / "y.safetensors", "wan")
    back = open_weights(tmp_path / "y.safetensors").groups[""]
    assert back.keys() == arrays("tiny_vae").keys()
    assert all(np.array_equal(back[key].read(), array) for key, array in arrays("tiny_vae").items())
    with pytest.raises(ValueError, match=r"'diffusers' has no tiny video autoencoder; export it to one of \['wan'\]"):
        their_tensors(source, "diffusers")


def test_what_wan_does_not_use_of_clip_is_said_and_nothing_else_is_taken(tmp_path):
    source = open_checkpoint(save(tmp_path / "x.pth", arrays("clip")), num_heads=2)
    assert "left aside: what Wan does not use (4)" in str(source)
    with pytest.raises(ValueError, match="CLIP image tower lacks what Wan does not use of it: .*visual.post_norm.bias"):
        their_tensors(source, "wan")
    extra = arrays("clip") | {"visual.extra": np.zeros(1)}
    with pytest.raises(ValueError, match=r"not used \[visual.extra \(1,\)\]"):
        open_checkpoint(save(tmp_path / "y.pth", extra), num_heads=2).ours()


def test_one_network_given_as_another(tmp_path):
    text = save(tmp_path / "text.pth", arrays("umt5"))
    with pytest.raises(ValueError, match=r"text.pth is a umT5 text encoder, not a video autoencoder \(vae\)"):
        open_checkpoint(text, model="vae")
    with pytest.raises(ValueError, match=r"not of the size of umt5-xxl: vocabulary=50 instead of 256384"):
        open_checkpoint(text, model="umt5-xxl")


def test_a_file_with_all_networks_is_asked_for_one(tmp_path):
    whole = {f"model.diffusion_model.{k}": v for k, v in wan_arrays().items()}
    whole |= {f"vae.{k}": v for k, v in arrays("vae").items()}
    path = save(tmp_path / "all.safetensors", whole)
    with pytest.raises(ValueError, match=r"several networks.*--entry from \['model.diffusion_model', 'vae'\]"):
        open_checkpoint(path)
    assert open_checkpoint(path, entry="vae").config == CONFIGS["vae"]
    assert open_checkpoint(path, entry="diffusion_model", num_heads=4).config == T2V


def test_diffusers_says_how_latents_are_normalised(tmp_path):
    config = {"_class_name": "AutoencoderKLWan", "latents_mean": [1, 2, 3], "latents_std": [4, 5, 6]}
    found = open_checkpoint(save(tmp_path / "x.safetensors", arrays("vae"), config=config)).config
    assert (found.mean, found.std) == ((1, 2, 3), (4, 5, 6))


def test_bfloat16_leaves_norms_as_they_are():
    for network in NETWORKS[1:]:
        flat = open_flat(network.name)
        kept = {name for name, tensor in with_dtype(flat, "bfloat16", network).items() if tensor.dtype == np.float32}
        norms = {name for name in flat if any(part.startswith("norm") for part in name.split("/"))}
        assert kept == norms | ({"blocks/position"} & set(flat))


def open_flat(name):
    return {path: Tensor.of(array) for path, array in flatten_dict(params(name), sep="/").items()}
