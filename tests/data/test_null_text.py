"""The unconditional text of a run whose data have no words: read, or computed, never zeros."""

import dataclasses
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rcm_jax.data.config import DataConfig
from rcm_jax.data.null_text import open_null_text
from rcm_jax.worlds.wan.negative import PROMPT
from tests.convert.test_torch_io import Evil, zip_with
from tests.tiny import MODEL
from tests.wan.tiny import DIT, write_wan

SHARDS = DataConfig(name="shards", batch_size=1, latent_shape=(3, 4, 4))
FEATURES = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)


def of(path, model=MODEL):
    return open_null_text(dataclasses.replace(SHARDS, null_text=str(path)), model)


def bare(path, array):
    """As `torch.save(tensor, path)` lays a bfloat16 tensor out."""

    def plain(value):
        return pickle.dumps(value, protocol=2)[2:-1]

    where = b"(" + plain("storage") + b"ctorch\nBFloat16Storage\n"
    where += plain("0") + plain("cpu") + plain(array.size) + b"tQ"
    rest = plain(0) + plain(array.shape) + plain((array.shape[1], 1)) + b"\x89ccollections\nOrderedDict\n)R"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + where + rest + b"tR.")
        archive.writestr("archive/data/0", array.tobytes())
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("form", ["npy", "safetensors", "pt"])
def test_a_file_of_one_tensor(tmp_path, form):
    path = tmp_path / f"null.{form}"
    rounded = FEATURES.astype(ml_dtypes.bfloat16)
    if form == "npy":
        np.save(path, FEATURES)
    else:
        save_file({"emb": rounded}, path) if form == "safetensors" else bare(path, rounded)
    found = of(path)
    assert (found.shape, found.dtype) == ((8, 64), np.float32)
    np.testing.assert_array_equal(found[:5], FEATURES if form == "npy" else rounded.astype(np.float32))
    assert not found[5:].any()


def test_what_is_no_text_is_refused(tmp_path):
    def refused(array, why, model=MODEL):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises((ValueError, FloatingPointError), match=why):
            of(tmp_path / "x.npy", model)

    refused(np.zeros((5, 64)), r"data.null_text=.*x.npy is all zeros, which is no text")
    refused(FEATURES[:, :3], r"must be \[tokens, 64\], as the network reads texts; it is \(5, 3\)")
    refused(FEATURES[None], r"must be \[tokens, 64\]")
    refused(np.ones((9, 64)), r"has 9 tokens, and the network reads 8")
    refused(FEATURES * np.nan, r"320 of 320 numbers are NaN")
    refused(np.array([{"a": 1}], object), "data.null_text: .*allow_pickle")
    save_file({"a": FEATURES, "b": FEATURES}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"data.null_text: .*two.safetensors is not one tensor alone; it holds 2"):
        of(tmp_path / "two.safetensors")
    with pytest.raises(FileNotFoundError, match=r"data.null_text: there is no file at .*absent"):
        of(tmp_path / "absent")


def test_a_file_that_wants_to_run_code_is_refused(tmp_path):
    zip_with(tmp_path / "x.pt", pickle.dumps(Evil(tmp_path / "canary"), protocol=2))
    with pytest.raises(ValueError, match=r"data.null_text: .*is refused: its pickle asks for posix.system"):
        of(tmp_path / "x.pt")
    assert not (tmp_path / "canary").exists()


def test_without_a_file_the_negative_prompt_is_encoded(tmp_path, monkeypatch):
    folder = write_wan(tmp_path / "wan")
    with pytest.raises(ValueError, match=r"data.null_text is empty, and data.name='shards' has no words") as error:
        open_null_text(SHARDS, DIT)
    assert "\n" not in str(error.value)
    asked = []
    monkeypatch.setattr("rcm_jax.wan.tokenizer.clean_prompt", lambda prompt: asked.append(prompt) or prompt)
    found = open_null_text(SHARDS, DIT, text_encoder=str(folder))
    assert asked == [PROMPT]
    assert (found.shape, found.dtype) == ((512, 24), np.float32)
    assert np.isfinite(found).all()
    assert found.any()
    narrower = dataclasses.replace(DIT, text_dim=20)
    with pytest.raises(ValueError, match=r"the negative prompt's features by .* must be \[tokens, 20\]"):
        open_null_text(SHARDS, narrower, text_encoder=str(folder))
