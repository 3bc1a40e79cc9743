"""Model files: whole, self-describing, and checked before use."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from rcm_jax import model_file
from rcm_jax.model_file import ModelInfo, load_model, read_info, save_model
from rcm_jax.wan.networks import init_params
from rcm_jax.worlds.builtin import BUILTIN, find_model
from tests.tiny import MODEL

INFO = ModelInfo(model=MODEL, kind="student", world="toy", latent_shape=(9, 6, 6), sigma_max=120.0, note="a test")


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, init_params(MODEL, jax.random.key(0)))


def test_round_trip(tmp_path, params):
    path = save_model(tmp_path / "new" / "m.safetensors", params, INFO)
    loaded, info = load_model(path)
    assert info == INFO
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode, "others may read it where the user's umask says so"


def test_files_written_before_causal_networks_and_experts_load(tmp_path, params):
    metadata = json.loads(INFO.to_json())
    assert metadata.pop("causal") == {}
    assert metadata.pop("t_range") == [0, 1]
    flat = {"/".join(p.key for p in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    save_file(flat, tmp_path / "old.safetensors", {"format": model_file.FORMAT, "info": json.dumps(metadata)})
    assert load_model(tmp_path / "old.safetensors")[1] == INFO


def test_names_of_files_in_the_package(tmp_path, monkeypatch):
    assert read_info(find_model("toy")).kind == "teacher"
    assert find_model("some/where.safetensors") == find_model("some") / "where.safetensors"
    monkeypatch.setitem(BUILTIN, "toy_causal", tmp_path / "toy_causal_student.safetensors")
    with pytest.raises(FileNotFoundError, match="no toy_causal_student.safetensors, which 'toy_causal' stands for"):
        find_model("toy_causal")


def test_half_precision_on_disk_is_float32_in_memory(tmp_path, params):
    full = save_model(tmp_path / "a.safetensors", params, INFO)
    half = save_model(tmp_path / "b.safetensors", params, INFO, dtype="float16")
    assert half.stat().st_size < 0.6 * full.stat().st_size
    loaded, _ = load_model(half)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), loaded, params)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(loaded))


def test_a_misfit_lists_all_that_differs(tmp_path, params):
    path = save_model(tmp_path / "m.safetensors", params, INFO)
    wider = dataclasses.replace(MODEL, ffn_dim=40)
    with pytest.raises(ValueError, match=r"ffn_in/bias: \(2, 32\) in the file, \(2, 40\) in the config") as error:
        load_model(path, expect=wider)
    assert str(error.value).count("in the file") == 3


def test_files_that_are_not_ours(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model file at"):
        read_info(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_info(tmp_path / "text.safetensors")
    save_file({"x": np.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not written by rcm_jax"):
        read_info(tmp_path / "other.safetensors")


def test_an_unfinished_file_does_not_replace_a_whole_one(tmp_path, params, monkeypatch):
    path = save_model(tmp_path / "m.safetensors", params, INFO)
    before = path.read_bytes()

    def full_disk(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rcm_jax.model_file.write_safetensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(path, params, INFO)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_folder_that_is_no_network_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} is a folder .* no model.json.* \(.safetensors\): none"):
        load_model(tmp_path)
    (tmp_path / "student.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r": student.safetensors; give the file itself"):
        load_model(tmp_path)
