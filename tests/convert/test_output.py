"""What is written is whole or is not there, and what was there stays until it is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rcm_jax.convert.output import check_apart, check_form, check_place, unfinished, write_model
from rcm_jax.convert.tensors import Tensor
from rcm_jax.errors import ArgumentError
from rcm_jax.model_file import ModelInfo, load_model
from tests.convert.tiny import T2V

INFO = ModelInfo(T2V, "teacher", "wan")


def breaking(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, format, there):
    path = tmp_path / "out"
    if there:
        path.write_text("mine")
    tensors = {"a": Tensor.of(np.ones(3)), "b": Tensor((4,), np.dtype(np.float32), breaking)}
    with pytest.raises(OSError, match="cannot write .*out: No space left on device"):
        write_model(path, tensors, INFO, format=format, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if there else [])
    assert not there or path.read_text() == "mine"


@pytest.mark.parametrize("old", ["file", "folder"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_overwriting_replaces_files_and_folders(tmp_path, old, new):
    def make(path: Path, kind: str) -> None:
        if kind == "folder":
            path.mkdir()
            (path / "config.json").touch()
        else:
            path.write_text(kind)

    make(tmp_path / "out", old)
    with (
        pytest.raises(FileExistsError, match="is there already; --overwrite"),
        unfinished(tmp_path / "out", 0, overwrite=False),
    ):
        pytest.fail("reached")
    with unfinished(tmp_path / "out", 0, overwrite=True) as path:
        make(path, new)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").is_dir() == (new == "folder")


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with (
        pytest.raises(FileExistsError, match="not one of a network alone"),
        unfinished(tmp_path / "work", 0, overwrite=True),
    ):
        pytest.fail("reached")
    assert (tmp_path / "work" / "thesis.txt").read_text() == "mine"


def test_a_published_folder_is_not_replaced_by_one_of_its_networks(tmp_path):
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth"):
        (tmp_path / name).write_text("published")
    with pytest.raises(FileExistsError, match="not one of a network alone"):
        check_place(tmp_path, overwrite=True)


@pytest.mark.parametrize(
    ("name", "form", "words"),
    [
        ("b.mp4", "safetensors", "is a .safetensors file; give b.mp4.safetensors"),
        ("b.pth", "safetensors", "is a .safetensors file; give b.safetensors"),
        ("wan-1.3b", "safetensors", "is a .safetensors file; give wan-1.3b.safetensors"),
        ("b.safetensors", "orbax", "is a folder; give b"),
        ("b.bin", "wan", "is a .safetensors, .pt or .pth file; give b.safetensors"),
        ("b.pth", "diffusers", "is a folder; give b"),
    ],
)
def test_names_that_a_form_does_not_have(name, form, words):
    with pytest.raises(ValueError, match=f"{name}: the {form} form {words}$"):
        check_form(Path(name), form)
    for right, of in (("a.safetensors", "safetensors"), ("wan-1.3b", "orbax"), ("a.pt", "rcm"), ("a.pth", "wan")):
        check_form(Path(right), of)


@pytest.mark.parametrize("link", ["", "symbolic", "hard"])
def test_a_source_is_not_overwritten(tmp_path, link):
    source = tmp_path / "source.safetensors"
    source.write_text("mine")
    out = tmp_path / "out.safetensors" if link else source
    if link:
        (out.symlink_to if link == "symbolic" else out.hardlink_to)(source)
    with pytest.raises(FileExistsError, match="is what is read"):
        check_apart(out, [tmp_path / "absent", source])
    check_apart(tmp_path / "new.safetensors", [source])


def test_a_file_of_a_source_is_not_overwritten(tmp_path):
    folder = tmp_path / "wan"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "Wan2.1_VAE.pth"):
        (folder / name).write_text("{}")
    for out, source in (
        (folder / "model.safetensors", folder),
        (folder, folder),
        (folder, folder / "model.safetensors"),
    ):
        with pytest.raises(FileExistsError, match="is what is read"):
            check_apart(out, [source])
    check_apart(folder / "Wan2.1_VAE.pth", [folder])  # in the folder, and no part of its network
    write_model(tmp_path / "checkpoint", {"a": Tensor.of(np.ones(3))}, INFO, format="orbax")
    with pytest.raises(FileExistsError, match="is what is read"):
        check_apart(tmp_path / "checkpoint" / "model.json", [tmp_path / "checkpoint"])


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "out", Path("/proc/out")):
        refused = pytest.raises(ArgumentError, match=f"cannot write {path.parent}: ")
        with refused, unfinished(path, 0, overwrite=False) as new:
            new.write_text("x")
    with pytest.raises(ArgumentError, match=f"{tmp_path / 'file'} is a file; name a folder"):
        check_place(tmp_path / "file" / "deep" / "out", overwrite=False)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_disk_too_small_is_known_before_anything_is_written(tmp_path):
    huge = Tensor((1 << 60,), np.dtype(np.float32), breaking)
    with pytest.raises(OSError, match=r"has .* GB left, and out takes 4611686018.43 GB"):
        write_model(tmp_path / "out", {"a": huge}, INFO)
    assert not list(tmp_path.iterdir())


# a gigabyte that takes no room on the disk, to be stopped in the midst of
SLOW = """
import signal, sys, time
from pathlib import Path
import numpy as np
from rcm_jax.convert import commands, output, tensors
from rcm_jax.model_file import ModelInfo
from tests.convert.tiny import T2V

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell's background job starts

def load():
    print("writing", flush=True)
    time.sleep(60)

with commands.tidy_when_stopped():
    parts = {"a": tensors.Tensor.of(np.ones(3)), "b": tensors.Tensor((4,), np.dtype(np.float32), load)}
    output.write_model(Path(sys.argv[1]), parts, ModelInfo(T2V, "teacher", "wan"), overwrite=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_conversion_leaves_no_half_file(tmp_path, number, code):
    path = tmp_path / "out.safetensors"
    path.write_text("mine")
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(path)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert child.stdout.readline() == "writing\n"
    child.send_signal(number)
    assert child.wait(30) == code
    child.stdout.close()
    assert path.read_text() == "mine"
    left = [p.name for p in tmp_path.iterdir()]
    assert left == ["out.safetensors"] if number != signal.SIGKILL else "out.safetensors" in left


def test_what_a_kill_left_is_no_hindrance(tmp_path):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "half").write_text("x")
    with unfinished(tmp_path / "out", 0, overwrite=False) as path:
        path.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_both_formats_load_as_one(tmp_path):
    from rcm_jax.convert.networks import NETWORKS

    rng = np.random.default_rng(0)
    flat = {k: rng.normal(size=s).astype(np.float32) for k, s in NETWORKS[0].shapes(T2V).items()}
    flat["head/out/bias"] = np.zeros_like(flat["head/out/bias"])  # which Orbax need not store
    start = time.monotonic()
    for format in ("safetensors", "orbax"):
        write_model(tmp_path / format, {k: Tensor.of(v) for k, v in flat.items()}, INFO, format=format)
        params, info = load_model(tmp_path / format)
        assert info == INFO
        for name, array in flat.items():
            leaf = params
            for part in name.split("/"):
                leaf = leaf[part]
            np.testing.assert_array_equal(leaf, array)
    assert time.monotonic() - start < 60
