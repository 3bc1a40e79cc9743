"""Tensors that are not read yet: what they say before, what they give after, and when they are read."""

import ml_dtypes
import numpy as np
import pytest

from rcm_jax.convert import tensors
from rcm_jax.convert.safetensors_io import read_safetensors
from rcm_jax.convert.tensors import Tensor
from rcm_jax.tensor_stream import write_safetensors


def joined(tensor: Tensor) -> np.ndarray:
    return np.concatenate([block.reshape(-1) for block in tensor.blocks()]).reshape(tensor.shape)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 64)
    monkeypatch.setattr(tensors, "TILE", 3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape", [(), (5,), (7, 11), (2, 3, 4, 5)])
def test_blocks_make_up_the_tensor(shape, dtype):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    tensor = Tensor.of(array).apply(np.transpose).astype(dtype)
    assert tensor.shape == shape[::-1]
    np.testing.assert_array_equal(joined(tensor), array.T.astype(dtype))
    assert all(block.flags.c_contiguous for block in tensor.blocks())
    assert len(list(tensor.blocks())) > 1 or array.nbytes <= 64


@pytest.mark.usefixtures("small_blocks")
def test_stacked_tensors_read_what_is_asked():
    arrays = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    opened = []

    def layer(i: int) -> Tensor:
        return Tensor((6, 5), np.dtype(np.float32), lambda: opened.append(i) or arrays[i])

    stack = Tensor.stack([layer(i) for i in range(4)])
    assert (stack.shape, stack.nbytes, opened) == ((4, 6, 5), 480, [])
    part = stack.read((slice(1, 3), slice(None), slice(2, 4)))
    assert opened == [1, 2]
    np.testing.assert_array_equal(part, arrays[1:3, :, 2:4])
    np.testing.assert_array_equal(joined(stack), arrays)
    np.testing.assert_array_equal(stack.layer(2).read(), arrays[2])
    np.testing.assert_array_equal(stack.astype("bfloat16").read(), arrays.astype(ml_dtypes.bfloat16))


def test_layers_of_two_precisions_meet_in_the_finer():
    layers = [Tensor.of(np.full(2, 1 / 3, dtype)) for dtype in (ml_dtypes.bfloat16, np.float32)]
    stack = Tensor.stack(layers)
    assert stack.dtype == np.float32
    assert stack.read()[1, 0] == np.float32(1 / 3)
    with pytest.raises(ValueError, match=r"the layers differ in shape: a is \(2,\), but b \(3,\)"):
        Tensor.stack([Tensor.of(np.zeros(2), "a"), Tensor.of(np.zeros(3), "b")])


def test_a_layout_that_does_not_fit_names_the_tensor():
    with pytest.raises(ValueError, match=r"q.weight has shape \(3, 4\)"):
        Tensor.of(np.zeros((3, 4)), "q.weight").apply(lambda x: x.reshape(5, 5))


def test_safetensors_files_are_the_library_s(tmp_path):
    from safetensors.numpy import load_file, save_file

    arrays = {
        "b/kernel": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
        "a": np.arange(4).astype(ml_dtypes.bfloat16), "empty": np.zeros((0, 2)), "scalar": np.array(3),
    }  # fmt: skip
    write_safetensors(tmp_path / "x", {k: Tensor.of(v) for k, v in arrays.items()}, {"format": "pt"}, lambda _: None)
    for name, array in load_file(tmp_path / "x").items():
        np.testing.assert_array_equal(array, arrays[name])
    save_file(arrays, tmp_path / "y", {"k": "v"})
    read, metadata = read_safetensors(tmp_path / "y")
    assert metadata == {"k": "v"}
    assert {name: t.shape for name, t in read.items()} == {name: a.shape for name, a in arrays.items()}
    for name, tensor in read.items():
        np.testing.assert_array_equal(tensor.read(), arrays[name], strict=True)
