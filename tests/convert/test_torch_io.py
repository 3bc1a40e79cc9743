"""PyTorch's files: read to the bit, without PyTorch, and never run."""

import argparse
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rcm_jax.convert.tensors import Tensor
from rcm_jax.convert.torch_io import LEGACY_MAGIC, LEGACY_PROTOCOL, read_torch, write_torch
from rcm_jax.convert.torch_pickle import Refused, SetAside

FILES = Path(__file__).parent / "files"  # written by torch 2.13: {"generator": OrderedDict, "step": 3, "history": […]}


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
def test_files_of_torch(name):
    saved = read_torch(FILES / name)
    assert saved["step"] == 3
    assert saved["history"] == [1.5, None, True]
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "whole": base, "transposed": base.T, "part": base[1:3, 2:],
        "half": (np.arange(5) / 4).astype(ml_dtypes.bfloat16), "scalar": np.array(7),
        "parameter": np.ones((2, 2), np.float32), "empty": np.zeros((0, 3), np.float32),
    }  # fmt: skip
    assert list(saved["generator"]) == list(expected)
    for key, array in expected.items():
        tensor = saved["generator"][key]
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype), key
        np.testing.assert_array_equal(tensor.read(), array, strict=True)


def test_reading_does_not_import_torch():
    code = "import sys; from pathlib import Path; from rcm_jax.convert.torch_io import read_torch\n"
    code += f"read_torch(Path({str(FILES / 'zip.pt')!r})); read_torch(Path({str(FILES / 'legacy.pt')!r}))\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4)).astype(np.float32), "b": rng.normal(size=7).astype(ml_dtypes.bfloat16),
        "c": np.array(2.5, np.float16), "d": np.zeros((2, 0)), "e": rng.integers(0, 9, (2, 3, 4)), "π.x": np.ones(1),
    }  # fmt: skip
    write_torch(tmp_path / "x.pt", {k: Tensor.of(v) for k, v in arrays.items()}, lambda _: None)
    read = read_torch(tmp_path / "x.pt")
    assert list(read) == list(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(read[key].read(), array, strict=True)


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def zip_with(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", bytes(16))
    return path


def legacy_with(path: Path, program: bytes) -> Path:
    head = [LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(x, 2) for x in head) + program + pickle.dumps([], 2))
    return path


@pytest.mark.parametrize("wrap", [zip_with, legacy_with])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, wrap):
    canary = tmp_path / "canary"
    path = wrap(tmp_path / "x.pt", pickle.dumps({"a": Evil(canary)}, 2))
    with pytest.raises(Refused, match=r"refused: its pickle asks for posix.system.*nothing of it was run"):
        read_torch(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Evil(canary), 2))  # it would have
    assert canary.exists()


@pytest.mark.parametrize("name", ["builtins eval", "os.path join", "importlib import_module", "pickle loads"])
def test_names_of_what_runs_programs_end_the_reading(tmp_path, name):
    module, attribute = name.split()
    program = f"c{module}\n{attribute}\n.".encode()
    with pytest.raises(Refused, match=f"{module}.{attribute}"):
        read_torch(zip_with(tmp_path / "x.pt", program))


TOUCHED = []


def touch(*_):
    """What a pickle might call, in a module that nobody suspects."""
    TOUCHED.append(1)
    return {}


class Touching:
    def __reduce__(self):
        return touch, (1,)


class Old:
    """Pickled by protocol 0 through copyreg."""

    def __init__(self):
        self.size = 3


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("wrap", [zip_with, legacy_with])
def test_other_classes_are_set_aside_and_nothing_of_them_runs(tmp_path, wrap, protocol):
    saved = {
        "args": argparse.Namespace(lr=0.1, path=Path("x")), "loss": np.float64(2.5), "touch": Touching(), "old": Old(),
        "many": {Old(): [1, Old()]}, "set": {1, 2}, "step": 3,
    }  # fmt: skip
    read = read_torch(wrap(tmp_path / "x.pt", pickle.dumps(saved, protocol)))
    assert TOUCHED == []
    assert read["step"] == 3
    kinds = {name: read[name].kind for name in ("args", "touch", "old")}
    assert kinds == {
        "args": "argparse.Namespace", "touch": f"{__name__}.touch", "old": f"{__name__}.Old",
    }  # fmt: skip
    assert isinstance(read["loss"], SetAside)
    pickle.loads(pickle.dumps(Touching()))
    assert TOUCHED.pop() == 1  # it would have


def test_float8_of_torch(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    want = {"a": x.astype(ml_dtypes.float8_e4m3fn), "b": x.astype(ml_dtypes.float8_e5m2).T}
    read = read_torch(FILES / "float8.pt")
    for key, array in want.items():
        np.testing.assert_array_equal(read[key].read().view(np.uint8), array.view(np.uint8), strict=True)
        assert read[key].dtype == array.dtype
    np.testing.assert_array_equal(read["c"].read().astype(np.float32), x[1:, 1:])
    write_torch(tmp_path / "again.pt", {key: Tensor.of(x) for key, x in want.items()}, lambda _: None)
    for key, tensor in read_torch(tmp_path / "again.pt").items():
        np.testing.assert_array_equal(tensor.read().view(np.uint8), want[key].view(np.uint8))


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


def tensor_program(start: int, shape: bytes, strides: bytes) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K" + bytes([start]) + shape + strides + b"\x89}tR"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (tensor_program(0, b"K\x05\x85", b"K\x01\x85"), "outside of its storage"),
        (tensor_program(1, b"K\x04\x85", b"K\x01\x85"), "outside of its storage"),
        (tensor_program(0, b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "outside of its storage"),
        (STORAGE + b"}X\x04\x00\x00\x00pathX\x0b\x00\x00\x00/etc/passwdsb", "change the reader's own objects"),
        (tensor_program(0, b"K\x04\x85", b"K\x01\x85") + b"}X\x04\x00\x00\x00loadNsb", "change the reader's"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aNsb", "change the reader's"),
    ],
)
def test_tensors_keep_to_their_storage(tmp_path, program, words):
    good = zip_with(tmp_path / "good.pt", tensor_program(0, b"K\x04\x85", b"K\x01\x85") + b".")
    np.testing.assert_array_equal(read_torch(good).read(), np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=words):
        read_torch(zip_with(tmp_path / "x.pt", program + b"."))


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
def test_a_cut_file_is_one_clear_error(tmp_path, name):
    whole = (FILES / name).read_bytes()
    path = tmp_path / name
    for length in range(4, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a whole PyTorch file"):
            read_torch(path)


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
def test_a_damaged_file_raises_nothing_but_value_errors(tmp_path, name):
    whole, path, rng = (FILES / name).read_bytes(), tmp_path / name, np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(4, len(whole), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_torch(path)
        except ValueError:
            refused += 1
    assert refused > 30


def test_compressed_storages_are_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_program(0, b"K\x04\x85", b"K\x01\x85") + b".")
        archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
    with pytest.raises(ValueError, match="compressed"):
        read_torch(tmp_path / "x.pt")
