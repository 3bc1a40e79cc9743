"""Ways back: every form holds every bit, under the names that its readers look for."""

import json

import numpy as np
import pytest

from rcm_jax.convert import commands
from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.export import export, their_tensors
from rcm_jax.convert.files import open_weights
from rcm_jax.convert.output import write_model
from rcm_jax.model_file import ModelInfo
from rcm_jax.tensor_stream import SUMS
from tests.convert.tiny import T2V, save, wan_arrays
from tests.test_entry_points import fails


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    source = open_checkpoint(save(folder / "x.pt", wan_arrays()), num_heads=4)
    write_model(folder / "m.safetensors", source.ours(), ModelInfo(T2V, "student", "wan"))
    return folder / "m.safetensors"


@pytest.mark.parametrize(
    ("target", "name"),
    [("wan", "x.safetensors"), ("wan", "x.pth"), ("rcm", "x.pt"), ("rcm", "x.safetensors"), ("diffusers", "folder")],
)
def test_round_trip_is_bit_exact(tmp_path, ours, target, name):
    export(open_checkpoint(ours), tmp_path / name, target)
    back = open_checkpoint(tmp_path / name, num_heads=None if target == "diffusers" else 4)
    assert (back.dialect, back.config) == (target, T2V)
    write_model(tmp_path / "again", back.ours(), ModelInfo(T2V, "student", "wan"))
    assert (tmp_path / "again").read_bytes() == ours.read_bytes()


def test_wan_names_are_those_of_the_published_file(tmp_path, ours):
    export(open_checkpoint(ours), tmp_path / "x.safetensors", "wan")
    tensors = open_weights(tmp_path / "x.safetensors").groups[""]
    arrays = wan_arrays()
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].read(), array)


def test_rcm_files_have_a_linear_patch_embedding(ours):
    tensors = their_tensors(open_checkpoint(ours), "rcm")
    weight = wan_arrays()["patch_embedding.weight"]
    np.testing.assert_array_equal(tensors["net.patch_embedding.weight"].read(), weight.reshape(48, -1))
    assert all(name.startswith("net.") for name in tensors)


def test_a_diffusers_folder_describes_itself(tmp_path, ours):
    export(open_checkpoint(ours), tmp_path / "d", "diffusers")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["_class_name"] == "WanTransformer3DModel"
    assert (config["num_attention_heads"], config["attention_head_dim"], config["num_layers"]) == (4, 12, 3)
    weights = open_weights(tmp_path / "d")
    assert set(weights.metadata) == {"format", SUMS}
    assert weights.metadata["format"] == "pt"  # without it transformers does not load a file
    np.testing.assert_array_equal(
        weights.groups[""]["blocks.2.attn2.to_out.0.weight"].read(), wan_arrays()["blocks.2.cross_attn.o.weight"]
    )


def test_bfloat16_leaves_what_is_computed_in_float32(ours):
    tensors = their_tensors(open_checkpoint(ours), "wan", "bfloat16")
    kept = {name for name, tensor in tensors.items() if tensor.dtype == np.float32}
    assert {name.split(".")[0] for name in kept if not name.startswith("blocks.")} == {
        "time_embedding", "time_projection", "head"
    }  # fmt: skip
    assert {name.split(".", 2)[2] for name in kept if name.startswith("blocks.")} == {
        "modulation", "norm3.weight", "norm3.bias", "self_attn.norm_q.weight", "self_attn.norm_k.weight",
        "cross_attn.norm_q.weight", "cross_attn.norm_k.weight",
    }  # fmt: skip
    assert str(tensors["blocks.0.ffn.0.weight"].dtype) == "bfloat16"


def test_forms_that_do_not_go_together(tmp_path, ours):
    source = open_checkpoint(ours)
    with pytest.raises(ValueError, match=r"'transformers' has no diffusion transformer.*'wan', 'rcm', 'diffusers'"):
        export(source, tmp_path / "d", "transformers")
    with pytest.raises(ValueError, match="the diffusers form is a folder"):
        export(source, tmp_path / "d.safetensors", "diffusers")
    with pytest.raises(ValueError, match="the wan form is a .safetensors, .pt or .pth file"):
        export(source, tmp_path / "d", "wan")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["wan", "diffusers"])
def test_shards_and_their_index(tmp_path, to):
    arrays = wan_arrays()
    source, out = save(tmp_path / "x.pt", arrays), tmp_path / "out"
    commands.main(["export", str(source), str(out), "--to", to, "--shard_size", "60kB", "--num_heads", "4"])
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    for path in out.glob("*.safetensors"):
        tensors = open_weights(path).groups[""]
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 60_000
    index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    assert set(index["weight_map"].values()) == set(files)
    for name, tensor in open_checkpoint(out, num_heads=4).wan().items():
        np.testing.assert_array_equal(tensor.read(), arrays[name], err_msg=name)
    whole = ["--shard_size", "1GB", "--num_heads", "4", "--overwrite"]
    commands.main(["export", str(source), str(out), "--to", to, *whole])
    assert [path.name for path in out.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("out.safetensors --shard_size 1GB", "the wan form is a folder; give out"),
        ("out --shard_size large", "'large' is no size: give 5GB or 500MB"),
        ("out --shard_size 0GB", "'0GB' is no size"),
    ],
)
def test_shards_that_cannot_be(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    fails(commands.main, ["export", str(save(tmp_path / "x.pt", wan_arrays())), *flags.split()], message)
