"""Damaged files end in a message that says where, and never in a wrong file."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.lora import read_lora
from rcm_jax.convert.output import write_model
from rcm_jax.convert.safetensors_io import read_header
from rcm_jax.convert.tensors import Tensor
from rcm_jax.convert.torch_io import write_torch
from rcm_jax.convert.verifying import lines_of_check
from rcm_jax.model_file import ModelInfo
from rcm_jax.tensor_stream import write_safetensors
from tests.convert.test_merge import as_comfyui
from tests.convert.tiny import wan_arrays
from tests.wan.tiny import CLIP, TINY_VAE, UMT5, VAE, arrays

ARRAYS = wan_arrays()
NAMES = sorted(ARRAYS)
FUZZ = dict(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
KINDS = (np.float16, ml_dtypes.bfloat16, np.float64, ml_dtypes.float8_e4m3fn, np.int64, np.uint8, np.bool_)


def written(path: Path, arrays) -> Path:
    tensors = {name: Tensor.of(x) for name, x in arrays.items()}
    if path.suffix == ".pt":
        write_torch(path, tensors, lambda _: None)
    else:
        write_safetensors(path, tensors, {}, lambda _: None)
    return path


def converted(path: Path, kind: str = "teacher") -> dict[str, np.ndarray]:
    """What a conversion writes, by Wan2.1's names; nothing is left behind where it fails."""
    out = path.with_name("out.safetensors")
    out.unlink(missing_ok=True)
    try:
        found = open_checkpoint(path, num_heads=4 if kind in ("teacher", "dit") else None)
        write_model(out, found.ours(), ModelInfo(found.config, "teacher" if kind == "dit" else kind, "wan"))
        return {name: tensor.read() for name, tensor in open_checkpoint(out).wan().items()}
    except Exception:
        assert not out.exists()
        assert not list(path.parent.glob("*.tmp"))
        raise


def told(path: Path, *names: str) -> None:
    """It is refused, with one of these in the message."""
    with pytest.raises(ValueError, match="|".join(map(re.escape, names))):
        converted(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


SUFFIX = st.sampled_from([".safetensors", ".pt"])
NAME = st.sampled_from(NAMES)


@settings(**FUZZ)
@given(suffix=SUFFIX, name=NAME, data=st.data())
def test_renamed(folder, suffix, name, data):
    other = data.draw(st.sampled_from([f"{name}.x", name.replace(".", "_"), name[1:], f"extra.{name}", "w"]))
    arrays = {(other if n == name else n): x for n, x in ARRAYS.items()}
    told(written(folder / f"renamed{suffix}", arrays), name, other)


@settings(**FUZZ)
@given(suffix=SUFFIX, name=NAME)
def test_missing(folder, suffix, name):
    told(written(folder / f"missing{suffix}", {n: x for n, x in ARRAYS.items() if n != name}), name)


OTHERS = {kind: arrays(kind, config, 0) for kind, config in (("vae", VAE), ("umt5", UMT5), ("clip", CLIP))} | {
    "dit": ARRAYS, "tiny_vae": arrays("tiny_vae", TINY_VAE, 0)
}  # fmt: skip


@pytest.mark.slow
@settings(**FUZZ | {"max_examples": 500})
@given(kind=st.sampled_from(sorted(OTHERS)), data=st.data())
def test_reshaped(folder, kind, data):
    """It is refused, or it is another network of a size that goes with all of its tensors."""
    own = OTHERS[kind]
    name = data.draw(st.sampled_from(sorted(own)))
    x = own[name]
    axis = data.draw(st.integers(0, max(0, x.ndim - 1)))
    changes = [x[None], x.reshape(-1) if x.ndim > 1 else x.reshape(-1, 1)]
    changes += [np.concatenate([x, x], axis), x.take([], axis)] if x.ndim else []
    changed = data.draw(st.sampled_from([y for y in changes if y.shape != x.shape]))
    path = written(folder / "reshaped.safetensors", own | {name: changed})
    try:
        found = open_checkpoint(path, num_heads=4 if kind == "dit" else None)
        ours = found.ours()
    except ValueError as error:
        message = str(error)  # what does not fit is listed, under a name with the block's number or {i}
        plain = re.sub(r"blocks\.\d+|transformer\.\d+", "", name).strip(".")
        assert plain in message or "shape" in message or "--num_heads" in message, message
    else:
        assert found.config != open_checkpoint(written(folder / "same.safetensors", own), num_heads=4).config
        assert all(t.size for t in ours.values())


@pytest.mark.slow
@settings(**FUZZ)
@given(suffix=SUFFIX, name=NAME, kind=st.sampled_from(KINDS))
def test_retyped(folder, suffix, name, kind):
    """Numbers of another dtype are those numbers, or the file is refused."""
    changed = ARRAYS[name].astype(kind)
    path = written(folder / f"retyped{suffix}", ARRAYS | {name: changed})
    try:
        got = converted(path)
    except ValueError:
        told(path, name, str(np.dtype(kind)))
        return
    np.testing.assert_array_equal(got[name].astype(np.float64), changed.astype(np.float64))
    for other in NAMES:
        if other != name:
            np.testing.assert_array_equal(got[other].astype(np.float32), ARRAYS[other])


@settings(**FUZZ)
@given(suffix=SUFFIX, data=st.data())
def test_truncated(folder, suffix, data):
    whole = written(folder / f"whole{suffix}", ARRAYS).read_bytes()
    path = folder / f"cut{suffix}"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match="cut"):  # the file's name
        converted(path)


@settings(**FUZZ)
@given(suffix=SUFFIX, data=st.data())
def test_bits_of_the_header_flipped(folder, suffix, data):
    """It is the same network, or it is refused."""
    whole = bytearray(written(folder / f"whole{suffix}", ARRAYS).read_bytes())
    end = 8 + int.from_bytes(whole[:8], "little") if suffix == ".safetensors" else 4096
    for place in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=3)):
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
    path = folder / f"flipped{suffix}"
    path.write_bytes(whole)
    try:
        got = converted(path)
    except (ValueError, OSError, MemoryError):
        return
    assert set(got) == set(ARRAYS)
    same = sum(np.array_equal(got[name].astype(np.float32), ARRAYS[name]) for name in NAMES)
    # a flipped offset or storage moves a tensor; the numbers are where they were, and those of ours tell it to `verify`
    assert same >= len(NAMES) - 3


@pytest.mark.long
@settings(**FUZZ)
@given(data=st.data(), kind=st.sampled_from(sorted(OTHERS)), ours=st.booleans())
def test_bits_of_the_numbers_flipped(folder, data, kind, ours):
    """The file says what was written into it, and `verify` which tensor is not that."""
    path = written(folder / "numbers.safetensors", OTHERS[kind])
    if ours:
        converted(path, kind)
        path = folder / "out.safetensors"
    assert [*lines_of_check(path)]
    entries, _, start = read_header(path)
    changed, whole = set(), bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(start, len(whole) - 1), min_size=1, max_size=3, unique=True)):
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
        inside = (n for n, e in entries.items() if e["data_offsets"][0] <= place - start < e["data_offsets"][1])
        changed.add(next(inside))
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="is not what was written") as told:
        [*lines_of_check(path)]
    assert set(str(told.value).partition("written: ")[2].split(", ")) == changed


@settings(**FUZZ)
@given(data=st.data())
def test_loras(folder, data):
    arrays = dict(as_comfyui(3.0)[0])
    name = data.draw(st.sampled_from(sorted(arrays)))
    how = data.draw(st.sampled_from(["renamed", "missing", "cut"]))
    path = folder / "lora.safetensors"
    if how == "renamed":
        arrays[name + "x"] = arrays.pop(name)
    elif how == "missing":
        if name.endswith(".alpha"):
            return
        del arrays[name]
    written(path, arrays)
    if how == "cut":
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    module = name.removeprefix("diffusion_model.").rpartition(".lora")[0] or name
    with pytest.raises(ValueError, match=f"{re.escape(module)}|{re.escape(str(path))}"):
        read_lora(path)


def test_a_header_that_lies_about_its_own_length(folder):
    path = folder / "lies.safetensors"
    for length in (0, 7, 2**40, 2**63):
        path.write_bytes(length.to_bytes(8, "little") + json.dumps({}).encode())
        with pytest.raises(ValueError, match="lies"):
            converted(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_whole_is_converted(folder, suffix):
    got = converted(written(folder / f"x{suffix}", ARRAYS))
    for name, x in ARRAYS.items():
        np.testing.assert_array_equal(got[name], x)
