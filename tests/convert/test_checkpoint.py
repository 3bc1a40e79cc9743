"""What a file is, is told from its names and shapes, in every form that files have."""

import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.dialects import DIFFUSERS_DIT
from rcm_jax.convert.dit import from_wan
from rcm_jax.convert.networks import MODELS
from rcm_jax.convert.output import write_model
from rcm_jax.convert.table import lazy_to_theirs
from rcm_jax.convert.tensors import Tensor
from rcm_jax.model_file import ModelInfo
from tests.convert.tiny import T2V, save, wan_arrays


@pytest.fixture(scope="module")
def wan():
    return wan_arrays()


@pytest.fixture(scope="module")
def ours(wan, tmp_path_factory):
    path = save(tmp_path_factory.mktemp("reference") / "x.safetensors", wan)
    return read(open_checkpoint(path, num_heads=4))


def read(checkpoint):
    return {name: tensor.read() for name, tensor in checkpoint.ours().items()}


def linear_patch(arrays):
    return arrays | {"patch_embedding.weight": arrays["patch_embedding.weight"].reshape(48, -1)}


def diffusers_names(arrays):
    return DIFFUSERS_DIT.from_wan(arrays)


@pytest.mark.parametrize(
    ("change", "prefix", "suffix", "dialect", "entry"),
    [
        (dict, "", ".safetensors", "wan", ""),
        (dict, "model.diffusion_model.", ".safetensors", "wan", "model.diffusion_model"),
        (dict, "model._fsdp_wrapped_module.", ".pt", "wan", "model"),
        (linear_patch, "net.", ".pth", "rcm", "net"),
        (linear_patch, "", ".pt", "rcm", ""),
        (diffusers_names, "", ".safetensors", "diffusers", ""),
        (diffusers_names, "transformer.", ".pt", "diffusers", "transformer"),
    ],
)
def test_every_form_of_one_network_is_the_same_network(tmp_path, wan, ours, change, prefix, suffix, dialect, entry):
    found = open_checkpoint(save(tmp_path / f"x{suffix}", change(wan), prefix), num_heads=4)
    assert (found.config, found.dialect, found.entry) == (T2V, dialect, entry)
    assert read(found).keys() == ours.keys()
    for name, array in read(found).items():
        np.testing.assert_array_equal(array, ours[name], name)


def test_what_is_found_is_said_in_one_line(tmp_path, wan):
    line = str(open_checkpoint(save(tmp_path / "x.pt", linear_patch(wan), "net."), num_heads=4))
    for words in ("diffusion transformer", "dim=48", "num_heads=4", "rCM names", "entry net", "96 tensors", "float32"):
        assert words in line
    assert "\n" not in line


@pytest.mark.parametrize("name", MODELS)
def test_published_sizes_are_read_from_shapes(name):
    network, config = MODELS[name]
    nothing = np.broadcast_to(np.float32(0), ())
    flat = {path: Tensor(shape, nothing.dtype, lambda: nothing) for path, shape in network.shapes(config).items()}
    wan = lazy_to_theirs(network.table.rows(config), flat, network.num_layers(config), network.table.layouts(config))
    shapes = {key: tensor.shape for key, tensor in wan.items()}
    if network.name == "clip":  # the block that Wan does not use
        shapes[f"visual.transformer.{config.num_layers}.norm1.weight"] = (config.dim,)
    assert network.read_config(shapes, {}, None) == config


def test_averaged_weights_come_first_and_entries_can_be_chosen(tmp_path, wan):
    both = {f"net.{k}": v for k, v in wan.items()} | {f"net_ema.{k}": v + 1 for k, v in wan.items()}
    both |= {f"net_fake_score.{k}": v for k, v in wan.items()}
    path = save(tmp_path / "state.pt", both)
    found = open_checkpoint(path, num_heads=4)
    assert (found.entry, found.aside) == ("net_ema", {"net": 96, "net_fake_score": 96})
    np.testing.assert_array_equal(found.ours()["head/out/bias"].read(), wan["head.head.bias"] + 1)
    assert "left aside: net (96), net_fake_score (96)" in str(found)
    chosen = open_checkpoint(path, entry="net_fake_score", num_heads=4)
    np.testing.assert_array_equal(chosen.ours()["head/out/bias"].read(), wan["head.head.bias"])
    with pytest.raises(ValueError, match="no network under 'ema'; it has .*net_ema"):
        open_checkpoint(path, entry="ema", num_heads=4)


def test_copies_that_no_preference_orders_are_asked_about(tmp_path, wan):
    both = {f"{who}.{k}": v for who in ("left", "right") for k, v in wan.items()}
    with pytest.raises(ValueError, match=r"several networks: choose with --entry from \['left', 'right'\]"):
        open_checkpoint(save(tmp_path / "x.safetensors", both), num_heads=4)


def test_a_name_with_and_without_its_wrapper(tmp_path, wan):
    twice = wan | {"_orig_mod.head.head.bias": wan["head.head.bias"]}
    with pytest.raises(ValueError, match="with and without a wrapper"):
        open_checkpoint(save(tmp_path / "x.pt", twice), num_heads=4)


def test_heads_are_told_by_config_json_or_are_128_wide(tmp_path, wan):
    theirs = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 8}
    assert open_checkpoint(save(tmp_path / "a" / "x.safetensors", wan, config=theirs)).config.num_heads == 8
    official = {"_class_name": "WanModel", "num_heads": 2}
    assert open_checkpoint(save(tmp_path / "b" / "x.safetensors", wan, config=official).parent).config.num_heads == 2
    other = save(tmp_path / "c" / "x.safetensors", wan, config={"_class_name": "AutoencoderKLWan", "num_heads": 2})
    with pytest.raises(ValueError, match="dim=48 does not divide into .* heads; .*--num_heads"):
        open_checkpoint(other)
    with pytest.raises(ValueError, match="dim=48 does not divide into 5 heads"):
        open_checkpoint(other, num_heads=5)


def test_missing_extra_and_misshapen_tensors_are_listed_with_shapes(tmp_path, wan):
    broken = {k: v for k, v in wan.items() if k != "blocks.1.self_attn.q.bias"} | {"extra.weight": np.zeros((2, 1))}
    with pytest.raises(ValueError, match=r"missing \[blocks.1.self_attn.q.bias \(48,\)\]; not used \[net.extra.w"):
        open_checkpoint(save(tmp_path / "a.pt", broken, "net."), num_heads=4).ours()
    bent = wan | {"blocks.2.ffn.0.weight": np.zeros((64, 47), np.float32), "head.head.bias": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"other shapes than the network") as error:
        open_checkpoint(save(tmp_path / "b.pt", bent), num_heads=4).ours()
    assert "blocks.2.ffn.0.weight (64, 47), expected (64, 48)" in str(error.value)
    assert "head.head.bias (3,), expected (16,)" in str(error.value)
    headless = {k: v for k, v in wan.items() if k != "patch_embedding.weight"}
    with pytest.raises(ValueError, match=r"patch_embedding.weight, which its size is read from, is missing"):
        open_checkpoint(save(tmp_path / "c.pt", headless), num_heads=4)


def test_shards_by_index_and_by_number(tmp_path, wan, ours):
    names = sorted(wan)
    parts = {f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, inside in parts.items():
        save_file({name: wan[name] for name in inside}, tmp_path / file)
    numbered = read(open_checkpoint(tmp_path, num_heads=4))
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for name, array in read(open_checkpoint(tmp_path, num_heads=4)).items():
        np.testing.assert_array_equal(array, ours[name])
        np.testing.assert_array_equal(array, numbered[name])
    file = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    file.unlink()
    with pytest.raises(ValueError, match=r"index.json names 3 files.*not there: \[.*00002-of-00003"):
        open_checkpoint(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="has 2 of the 3 files"):
        open_checkpoint(tmp_path)


def test_folders_that_leave_it_open(tmp_path, wan):
    with pytest.raises(ValueError, match="has no .safetensors"):
        open_checkpoint(tmp_path)
    save(tmp_path / "transformer" / "x.safetensors", wan, config={})
    with pytest.raises(ValueError, match=r"its networks are in \[.*transformer"):
        open_checkpoint(tmp_path)
    save(tmp_path / "a.pt", wan)
    save(tmp_path / "b.pt", wan)
    with pytest.raises(ValueError, match=r"has several networks; give one of .*a.pt.*b.pt"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_our_own_files_know_what_they_are(tmp_path, wan, ours, format):
    info = ModelInfo(T2V, "student", "wan", (3, 4, 4), note="here")
    first = open_checkpoint(save(tmp_path / "x.pt", wan), num_heads=4)
    write_model(tmp_path / "ours", first.ours(), info, format=format)
    again = open_checkpoint(tmp_path / "ours")
    assert (again.info, again.config, again.dialect) == (info, T2V, "rcm_jax")
    for name, array in read(again).items():
        np.testing.assert_array_equal(array, ours[name])


def test_the_named_model_must_be_it(tmp_path, wan):
    path = save(tmp_path / "x.pt", wan)
    with pytest.raises(ValueError, match=r"not of the size of t2v-1.3B: dim=48 instead of 1536, ffn_dim=64"):
        open_checkpoint(path, model="t2v-1.3B", num_heads=4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"once upon a time, a text", "neither a safetensors nor a PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git-lfs pointer"),
        (b"GGUF\x03\x00\x00\x00", "quantised"),
        (b"\xff\x00\x00\x00\x00\x00\x00\x00{" + b" " * 10, "not a whole safetensors file"),
    ],
)
def test_what_is_no_file_of_weights(tmp_path, content, words):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        open_checkpoint(tmp_path / "x.pth")


def test_a_cut_safetensors_file(tmp_path, wan):
    path = save(tmp_path / "x.safetensors", wan)
    whole = path.read_bytes()
    for length in (9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            open_checkpoint(path)


def test_weights_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder at"):
        open_checkpoint(tmp_path / "nowhere.pt")
    path = save(tmp_path / "x.pt", {"conv.weight": np.zeros(3)})
    with pytest.raises(ValueError, match="no network known here .diffusion transformer.*begin with conv.weight"):
        open_checkpoint(path)
    lora = save(tmp_path / "l.safetensors", {"diffusion_model.blocks.0.ffn.0.lora_down.weight": np.zeros((2, 48))})
    with pytest.raises(ValueError, match="is a LoRA.*merge"):
        open_checkpoint(lora)


def test_names_of_two_dialects_at_once(tmp_path, wan):
    both = DIFFUSERS_DIT.from_wan(wan) | {"head.head.bias": wan["head.head.bias"]}
    with pytest.raises(ValueError, match="under others at once"):
        open_checkpoint(save(tmp_path / "x.pt", both), num_heads=4)


def test_params_are_as_the_network_has_them(wan, ours):
    for path, array in flatten_dict(from_wan(wan, T2V)).items():
        np.testing.assert_array_equal(array, ours["/".join(path)])
