"""A conversion that was killed goes on where it was, and only if it is the same one."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.commands import main
from rcm_jax.convert.files import open_weights
from rcm_jax.convert.journal import journal_at
from rcm_jax.convert.output import resumed
from rcm_jax.convert.tensors import Tensor
from tests.convert.tiny import HEADS, T2V, save, wan_arrays
from tests.test_entry_points import fails

# argv: the piece at which the process kills itself, and the command; counts pieces that are read from the source
CHILD = """
import os, signal, sys
from rcm_jax.convert import commands, tensors

left, blocks, read = int(sys.argv[1]), tensors.Tensor.blocks, tensors.Tensor.read
def count(self):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
def blocks_counted(self):
    if not self.layers:
        count(self)
    for block in blocks(self):
        yield block
tensors.Tensor.blocks = blocks_counted
if "orbax" in sys.argv:
    tensors.Tensor.read = lambda self, *index: (index and count(self), read(self, *index))[1]
commands.main(sys.argv[2:])
"""
FORMS = {
    "ours": ([], "out.safetensors", []),
    "orbax": ([], "out", ["--format", "orbax"]),
    "shards": (["export"], "out", ["--to", "diffusers", "--shard_size", "60kB"]),
    "wan": (["export"], "out.safetensors", ["--dtype", "bfloat16"]),
}
TOTAL, SLOW = 96, pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("source") / "x.pt", wan_arrays())


def killed(pieces: int, *argv) -> None:
    """The command in a process that dies when it has read so many pieces."""
    env = os.environ | {"PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-c", CHILD, str(pieces), *map(str, argv), *HEADS]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def done(folder) -> int:
    """The pieces that the journal of what was stopped there knows; the first are the command and the header."""
    (journal,) = folder.glob("*.journal")
    return len(journal.read_bytes().splitlines()) - 2


@pytest.fixture
def finished(monkeypatch):
    """Runs a command to its end, and gives how many pieces it read."""

    def finish(*argv) -> int:
        read, blocks = [], Tensor.blocks

        def counted(self):
            read.extend([1] * (not self.layers))
            return blocks(self)

        monkeypatch.setattr(Tensor, "blocks", counted)
        main([*map(str, argv), *HEADS])
        monkeypatch.setattr(Tensor, "blocks", blocks)
        return len(read)

    return finish


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, source):
    """What a conversion leaves that dies after 50 of 96 pieces, to be put somewhere else."""
    folder = tmp_path_factory.mktemp("stopped")
    killed(50, source, folder / "out.safetensors")
    names = ["out.safetensors.tmp", "out.safetensors.tmp.journal"]
    assert sorted(path.name for path in folder.iterdir()) == names

    def put(path) -> int:
        """Gives how many pieces are written."""
        assert path.name == "out.safetensors"
        for name in names:
            shutil.copy(folder / name, path.parent)
        return done(folder)

    return put


def numbers(path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_checkpoint(path, num_heads=4).wan().items()}


def same(path, other) -> None:
    one, two = numbers(path), numbers(other)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name, strict=True)


@pytest.mark.parametrize("form", [form if form == "ours" else pytest.param(form, marks=SLOW) for form in FORMS])
def test_it_goes_on_where_it_was_killed(tmp_path, source, finished, form):
    words, out, flags = FORMS[form]
    whole = tmp_path / f"whole_{out}"
    main([*words, str(source), str(whole), *flags, *HEADS])
    path = tmp_path / out
    command = [*words, source, path, *flags]
    before = 0
    for stop in (4, 20, 33):  # pieces of each of three attempts
        killed(stop, *command)
        if form in ("ours", "wan"):  # the last that are read may not be written
            assert before + stop - 3 <= done(tmp_path) <= before + stop
        before = done(tmp_path)
        assert not path.exists()
        assert (tmp_path / f"{out}.tmp").exists()
        with pytest.raises((ValueError, OSError)):  # half of it is not read as a network
            open_checkpoint(tmp_path / f"{out}.tmp").ours()
    left = finished(*command)
    assert form not in ("ours", "wan") or left == TOTAL - before  # others have more headers, and Orbax no `blocks`
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([whole.name, out])
    same(path, whole)
    if form != "orbax":
        main(["verify", str(path)])


def test_another_conversion_begins_anew(tmp_path, source, stopped, finished):
    path, time = tmp_path / "out.safetensors", source.stat()
    stopped(path)
    assert finished(source, path, "--dtype", "bfloat16") == TOTAL
    path.unlink()
    stopped(path)
    os.utime(source, ns=(time.st_atime_ns, time.st_mtime_ns + 10**9))
    assert finished(source, path) == TOTAL
    os.utime(source, ns=(time.st_atime_ns, time.st_mtime_ns))
    path.unlink()
    stopped(path)
    other = save(tmp_path / "other.pt", wan_arrays(seed=1))
    assert finished(other, path) == TOTAL
    same(path, other)


def ends(path) -> list[int]:
    """Where each piece of a file of T2V ends: layers of a stacked tensor, other tensors whole."""
    entries, out = header_of(path), []
    for name, entry in entries.items():
        begin, stop = entry["data_offsets"]
        layers = T2V.num_layers if name.startswith("blocks/") else 1
        out += [begin + (stop - begin) * (i + 1) // layers for i in range(layers)]
    place = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return [place + end for end in out]


def header_of(path) -> dict:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def test_what_is_damaged_meanwhile_is_written_again(tmp_path, source, stopped, finished):
    path, half = tmp_path / "out.safetensors", tmp_path / "out.safetensors.tmp"
    stopped(path)
    data = bytearray(half.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 2] ^= 1  # in the first tensor
    half.write_bytes(data)
    assert finished(source, path) == TOTAL
    same(path, source)
    path.unlink()
    known = stopped(path)
    end = ends(half)[known - 1]
    half.write_bytes(half.read_bytes()[: end - 5])  # in the last that the journal knows
    assert finished(source, path) == TOTAL - known + 1
    same(path, source)


def test_a_journal_that_is_cut_or_alone(tmp_path, source, stopped, finished):
    path, journal = tmp_path / "out.safetensors", tmp_path / "out.safetensors.tmp.journal"
    known = stopped(path)
    assert 47 <= known <= 50
    assert finished(source, path) == TOTAL - known
    path.unlink()
    stopped(path)
    for end in (b"", b"zzzzzzzz\n", b"00000000\n"):
        stopped(path)
        journal.write_bytes(journal.read_bytes()[:-9] + end)
        assert finished(source, path) == TOTAL - known + 1
        same(path, source)
        path.unlink()
    stopped(path)
    journal.write_bytes(journal.read_bytes()[:-3])
    assert finished(source, path) == TOTAL - known + 1
    path.unlink()
    stopped(path)
    (tmp_path / "out.safetensors.tmp").unlink()
    assert finished(source, path) == TOTAL
    same(path, source)


def test_two_at_once_are_refused(tmp_path, source):
    path = tmp_path / "out.safetensors"
    with journal_at(path, None):
        fails(main, [str(source), str(path), *HEADS], f"another process is writing {path}")
    main([str(source), str(path), *HEADS])
    same(path, source)


def test_what_is_there_already_counts_as_room(tmp_path, monkeypatch):
    (tmp_path / "out.tmp").write_bytes(bytes(1000))
    (tmp_path / "out.tmp.journal").write_bytes(json.dumps({"a": 1}).encode() + b"\n")
    free = type("Usage", (), {"free": 500})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with resumed(tmp_path / "out", 1400, {"a": 1}, overwrite=False) as (new, journal):
        assert journal.goes_on
        assert new.stat().st_size == 1000
    too_much = pytest.raises(OSError, match="takes 0.00 GB")
    with too_much, resumed(tmp_path / "more", 1400, {"a": 1}, overwrite=False):
        pytest.fail("reached")


def test_a_folder_of_one_file_is_replaced(tmp_path, source):
    out = tmp_path / "out"
    command = ["export", str(source), str(out), "--to", "wan", "--shard_size", "1GB", *HEADS]
    main(command)
    assert [path.name for path in out.iterdir()] == ["diffusion_pytorch_model.safetensors"]
    fails(main, command, "is there already; --overwrite replaces it")
    main([*command, "--dtype", "bfloat16", "--overwrite"])
    assert {str(t.dtype) for t in open_weights(out).groups[""].values()} == {"bfloat16", "float32"}
    (out / "thesis.safetensors").touch()
    fails(main, [*command, "--overwrite"], "not one of a network alone")


def test_an_untold_origin_begins_anew(tmp_path):
    (tmp_path / "out.tmp").write_bytes(bytes(10))
    with resumed(tmp_path / "out", 0, None, overwrite=False) as (new, journal):
        assert not journal.goes_on
        assert not new.exists()
        new.write_text(str(Tensor.of(np.ones(1)).shape))
