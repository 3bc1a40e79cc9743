"""Sets of shards: made in parts, stopped at any time, by any number of processes, and the same in the end."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rcm_jax.data import shard_files
from rcm_jax.data.prepare import sets
from rcm_jax.data.prepare.options import SetOptions
from rcm_jax.data.prepare.sets import LeftOut, Plan, ShardSet, key_of
from rcm_jax.data.sample import Sample
from rcm_jax.data.shard_files import find_shards, open_shard

PLAN = Plan("test", {"frames": 5}, 7, "of")
FILES = ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]


def sample(number):
    latents = np.random.default_rng(number).normal(size=(2, 4, 4, 3)).astype(np.float32)
    return Sample(key_of(number), latents, np.full((number + 1, 6), 1, np.float32), f"prompt {number}")


def samples(numbers, stop=None):
    for number in numbers:
        if number == stop:
            raise RuntimeError("stopped")
        yield sample(number)


def opened(out, plan=PLAN, **options):
    return ShardSet(SetOptions(out=out, **{"samples_per_shard": 3} | options), plan)


def tars(out):
    """And their indices, and what is half written."""
    return {path.name: path.read_bytes() for path in out.iterdir() if "shard" in path.name}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("set") / "whole"
    told = opened(out).make(samples)
    assert told.startswith(f"{out}: 7 samples in 3 files, ")
    return out


def test_a_set_is_read_back_and_its_manifest_says_what_it_is(whole):
    read = [shard.read(i) for shard in map(open_shard, find_shards(whole)) for i in range(len(shard))]
    assert [(one.key, one.prompt) for one in read] == [(key_of(n), f"prompt {n}") for n in range(7)]
    np.testing.assert_array_equal(read[5].latents, sample(5).latents)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert (manifest["format"], manifest["kind"], manifest["samples"]) == (1, "test", 7)
    assert manifest["shapes"] == {"latents": [2, 4, 4, 3], "text": [7, 6]}  # the longest text's
    assert manifest["dtype"] == {"latents": "float32", "text": "float32"}
    assert manifest["settings"] == {"frames": 5}
    assert {"rcm_jax", "jax", "numpy", "av"} <= manifest["versions"].keys()
    assert [record["name"] for record in manifest["shards"]] == FILES
    assert [record["samples"] for record in manifest["shards"]] == [3, 3, 1]
    for record in manifest["shards"]:
        data = (whole / record["name"]).read_bytes()
        assert (record["bytes"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_what_is_whole_stays_and_the_rest_is_made_again(whole, tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        opened(tmp_path / "s").make(lambda numbers: samples(numbers, stop=4))
    assert set(tars(tmp_path / "s")) == {FILES[0], FILES[0] + ".index.json"}
    assert not (tmp_path / "s" / "manifest.json").exists()
    again = opened(tmp_path / "s")
    assert again.missing == [1, 2]
    assert again.order == [3, 4, 5, 6]
    again.make(samples)
    assert tars(tmp_path / "s") == tars(whole)
    assert (tmp_path / "s" / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert opened(tmp_path / "s").missing == []


def test_a_process_killed_between_and_in_shards(whole, tmp_path):
    root = Path(__file__).parents[3]
    program = (
        "import os, sys; from pathlib import Path; from tests.data.prepare.test_sets import opened, samples\n"
        "def killed(numbers):\n"
        "    for one in samples(numbers):\n"
        "        yield one\n"
        "        if one.key.endswith('4'): os.kill(os.getpid(), 9)\n"
        "opened(Path(sys.argv[1])).make(killed)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "s")]
    ended = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [Path(path).name for path in find_shards(tmp_path / "s")] == FILES[:1]  # what was begun has another name
    opened(tmp_path / "s").make(samples)
    assert tars(tmp_path / "s") == tars(whole)


def test_several_processes_make_what_one_makes(whole, tmp_path):
    for process in (1, 0):
        one = opened(tmp_path / "s", process=process, num_processes=2)
        assert one.missing == ([1] if process else [0, 2])
        told = one.make(samples)
    assert told.startswith(f"{tmp_path / 's'}: 7 samples")
    assert tars(tmp_path / "s") == tars(whole)
    assert (tmp_path / "s" / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="process=2 must be 0 to 1"):
        SetOptions(out=tmp_path, process=2, num_processes=2)


def test_a_disk_that_fills_leaves_nothing_half_written(whole, tmp_path, monkeypatch):
    written = []

    def full(file):
        written.append(file.name)
        if len(written) > 2:  # the second shard's tar
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "_to_disk", full)
        with pytest.raises(
            OSError, match=r"shard-000001.tar cannot be written: No space left on device; what is whole"
        ):
            opened(tmp_path / "s").make(samples)
    assert set(tars(tmp_path / "s")) == {FILES[0], FILES[0] + ".index.json"}
    opened(tmp_path / "s").make(samples)
    assert tars(tmp_path / "s") == tars(whole)
    large = Plan("test", {}, 7, "of", sample_bytes=10**15)
    with pytest.raises(OSError, match=r"GB left, and shard-000000.tar takes 3000000.00 GB"):
        opened(tmp_path / "other", large).make(lambda _: pytest.fail("computes"))


def test_a_whole_file_whose_record_was_lost_is_not_made_again(whole, tmp_path):
    opened(tmp_path / "s").make(samples)
    (tmp_path / "s" / sets.WORK / f"{FILES[1]}.json").unlink()
    manifest = (tmp_path / "s" / "manifest.json").read_bytes()
    assert opened(tmp_path / "s").missing == []
    opened(tmp_path / "s").make(lambda _: pytest.fail("makes"))
    assert (tmp_path / "s" / "manifest.json").read_bytes() == manifest
    (tmp_path / "s" / FILES[1]).write_bytes((whole / FILES[1]).read_bytes()[:3000])  # cut off
    assert opened(tmp_path / "s").missing == [1]


def test_two_that_make_one_file(tmp_path):
    def other(numbers):
        opened(tmp_path / "s").make(samples)
        yield from samples(numbers)

    with pytest.raises(RuntimeError, match=r"another process is making .*shard-000000.tar: give each its own number"):
        opened(tmp_path / "s").make(other)


def test_a_folder_of_another_set_is_refused(whole, tmp_path):
    with pytest.raises(ValueError, match=r"out=.* was made otherwise: frames was 5 and is 9; samples was 7 and is 8"):
        opened(whole, Plan("test", {"frames": 9}, 8, "of"))
    with pytest.raises(ValueError, match="samples_per_shard was 3 and is 4"):
        opened(whole, samples_per_shard=4)
    with pytest.raises(ValueError, match="what its samples are made of has changed"):
        opened(whole, Plan("test", {"frames": 5}, 7, "of other names"))
    (tmp_path / FILES[0]).write_bytes((whole / FILES[0]).read_bytes())
    with pytest.raises(ValueError, match=rf"out=.* holds {FILES[0]}, of a set that was not begun here"):
        opened(tmp_path)


def test_samples_that_are_left_out_are_named(tmp_path):
    def some(numbers):
        return (LeftOut(f"{n}.mp4", "dark") if n < 4 else sample(n) for n in numbers)

    told = opened(tmp_path / "s").make(some)
    assert told.endswith("; 4 left out, named in manifest.json")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["left_out"] == {f"{n}.mp4": "dark" for n in range(4)}
    assert [record["name"] for record in manifest["shards"]] == FILES[1:]  # nothing was left of the first
    assert manifest["samples"] == 3
    assert opened(tmp_path / "s").missing == []


def test_samples_of_two_shapes_are_refused(tmp_path):
    def two(numbers):
        for number in numbers:
            one = sample(number)
            yield one if number else Sample(one.key, one.latents[:1], one.text)

    with pytest.raises(ValueError, match=r"000000001: latents is \[2, 4, 4, 3\], and \[1, 4, 4, 3\] in what came"):
        opened(tmp_path / "s").make(two)
    assert not tars(tmp_path / "s")
