"""Shards, ours and the published ones: written whole, read to the bit, and nothing in them run."""

import hashlib
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from rcm_jax.data.sample import Sample
from rcm_jax.data.shard_files import find_shards, open_shard, write_shard
from tests.convert.test_torch_io import Evil, zip_with
from tests.data.published import bare, triple, write_tar

BF16 = ml_dtypes.bfloat16


def sample(i: int, dtype=BF16, **more) -> Sample:
    rng = np.random.default_rng(i)
    return Sample(
        f"{i:09d}", rng.normal(size=(3, 4, 5, 2)).astype(dtype), rng.normal(size=(6, 8)).astype(dtype), f"číslo {i}",
        **more,
    )  # fmt: skip


def same(a: Sample, b: Sample):
    assert (a.key, a.prompt) == (b.key, b.prompt)
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        np.testing.assert_array_equal(tensor, b.tensors[name], strict=True)


def members_of(s: Sample) -> list[tuple[str, bytes]]:
    return [*triple(s.key, np.moveaxis(s.latents, -1, -4), s.text, s.prompt).items()]


def test_ours_comes_back_to_the_bit(tmp_path):
    rng = np.random.default_rng(9)
    samples = [
        sample(0),
        sample(1, np.float32),
        sample(
            2, condition=rng.normal(size=(3, 4, 5, 7)).astype(BF16), image=rng.normal(size=(2, 3)).astype(np.float16)
        ),
        Sample("a folder/ODE", rng.normal(size=(5, 3, 4, 5, 2)).astype(BF16), rng.normal(size=(1, 8)).astype(BF16)),
    ]
    path = tmp_path / "shard-000000.tar"
    record = write_shard(path, samples)
    whole = path.read_bytes()
    assert (record.name, record.samples, record.bytes) == (path.name, 4, len(whole))
    assert record.sha256 == hashlib.sha256(whole).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, path.name + ".index.json"]
    for indexed in (True, False):
        shard = open_shard(path)
        assert shard.keys == tuple(s.key for s in samples)
        assert shard.broken == ()
        for i, expected in enumerate(samples):
            same(shard.read(i), expected)
        if indexed:
            (tmp_path / (path.name + ".index.json")).unlink()
    with tarfile.open(path) as tar:  # anybody's tar
        assert tar.getnames() == [f"{s.key}.safetensors" for s in samples]
    assert write_shard(tmp_path / "again.tar", samples).sha256 == record.sha256


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    bad = sample(1)
    bad.latents[0, 0, 0, 0] = np.nan
    for samples, why in [
        ([sample(0), sample(0)], "000000000 comes twice"),
        ([sample(0), bad], "000000001: latents: 1 of"),
    ]:
        with pytest.raises((ValueError, FloatingPointError), match=why):
            write_shard(tmp_path / "shard-0.tar", samples)
    for key in ("../up", "/root", "x" * 300):
        with pytest.raises(ValueError, match="a member of a tar cannot be called"):
            write_shard(tmp_path / "shard-0.tar", [Sample(key, sample(0).latents, sample(0).text)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_published_triples(tmp_path, form):
    samples = [sample(i) for i in range(3)]
    members = [m for s in samples for m in members_of(s)]
    members[3:6] = [(f"{name.split('.')[0]}/{name}", data) for name, data in members[3:6]]  # merged
    members[6:] = [("long/" * 28 + name, data) for name, data in members[6:]]
    path = write_tar(tmp_path / "shard_000000.tar", members, form)
    shard = open_shard(path)
    assert shard.keys == ("000000000", "000000001/000000001", "long/" * 28 + "000000002")
    for i, expected in enumerate(samples):
        read = shard.read(i)
        np.testing.assert_array_equal(read.latents, expected.latents, strict=True)
        np.testing.assert_array_equal(read.text, expected.text, strict=True)
        assert read.prompt == expected.prompt


def test_a_tensor_that_is_a_part_of_its_storage(tmp_path):
    store = np.arange(400, dtype=np.float32)
    expected = np.lib.stride_tricks.as_strided(store[7:], (2, 3, 4, 5), [4, 480, 40, 8])
    s = sample(0)
    members = dict(members_of(s))
    members[f"{s.key}.latent.pt"] = bare(store, offset=7, shape=(2, 3, 4, 5), strides=(1, 120, 10, 2))
    shard = open_shard(write_tar(tmp_path / "shard-0.tar", [*members.items()]))
    np.testing.assert_array_equal(shard.read(0).latents, np.moveaxis(expected, 0, -1), strict=True)


def test_the_last_of_a_name_counts_and_what_is_incomplete_is_left_out(tmp_path):
    first, again = sample(0), sample(1)
    again = Sample(first.key, again.latents, again.text, again.prompt)
    members = [*members_of(first)[:2], *members_of(sample(2)), *members_of(again), *members_of(sample(3))[1:]]
    shard = open_shard(write_tar(tmp_path / "shard-0.tar", members))
    assert shard.keys == ("000000000", "000000002")
    assert shard.broken == (f"{tmp_path}/shard-0.tar: 000000003 lacks .latent.pt",)
    same(shard.read(0), again)


@pytest.mark.parametrize("cut", [1, 600, 1500])  # within the last member, its header, the end's mark
def test_a_truncated_tar_keeps_what_is_whole(tmp_path, cut):
    path = write_tar(tmp_path / "shard-0.tar", [m for i in range(3) for m in members_of(sample(i))])
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1]
    where = {1: end.offset_data + 1, 600: end.offset + 100, 1500: end.offset_data + 512}[cut]
    path.write_bytes(data[:where])
    shard = open_shard(path)
    assert len(shard) == (3 if cut == 1500 else 2)
    assert any("cut off" in line or "ends within 000000002.prompt.txt" in line for line in shard.broken)
    same(shard.read(1), sample(1))


def test_an_index_that_lies_is_named_and_not_used(tmp_path, capsys):
    path = tmp_path / "shard-0.tar"
    write_shard(path, [sample(i) for i in range(3)])
    index = tmp_path / "shard-0.tar.index.json"
    true = json.loads(index.read_text())
    lies = {
        "it is of a file of 5 bytes": true | {"size": 5},
        "it names places that the file does not have": true | {"members": [["a.safetensors", 0, 1 << 40]]},
        "it is of format 9": true | {"format": 9},
        "it has no 'members'": {"format": 1, "size": true["size"]},
        "at byte 0 is 000000000.safetensors": true | {"members": [[n, 0, 9] for n, _, _ in true["members"]]},
        "no header at byte 512": true | {"members": [[n, 512, s] for n, _, s in true["members"]]},
    }
    for why, lie in lies.items():
        index.write_text(json.dumps(lie))
        shard = open_shard(path)
        assert shard.keys == tuple(f"{i:09d}" for i in range(3))
        for i in range(3):
            same(shard.read(i), sample(i))
        said = capsys.readouterr().err
        assert f"{path}" in said
        assert why in said
        assert said.count("\n") == 1
    index.write_text("{")
    assert len(open_shard(path)) == 3


def test_an_index_that_lies_is_found_by_many_threads_once(tmp_path, capsys):
    path = tmp_path / "shard-0.tar"
    write_shard(path, [sample(i) for i in range(16)])
    index = tmp_path / "shard-0.tar.index.json"
    true = json.loads(index.read_text())
    turned = [[name, *place] for (name, *_), (_, *place) in zip(true["members"], true["members"][::-1], strict=True)]
    index.write_text(json.dumps(true | {"members": turned}))
    shard = open_shard(path)
    with ThreadPoolExecutor(8) as pool:
        for i, read in enumerate(pool.map(shard.read, range(16))):
            same(read, sample(i))
    assert capsys.readouterr().err.count("\n") == 1


def test_a_malicious_pickle_is_refused(tmp_path):
    s = sample(0)
    members = dict(members_of(s))
    evil = zip_with(tmp_path / "x.pt", pickle.dumps(Evil(tmp_path / "canary"), protocol=2)).read_bytes()
    members[f"{s.key}.latent.pt"] = evil
    shard = open_shard(write_tar(tmp_path / "shard-0.tar", [*members.items()]))
    with pytest.raises(
        ValueError, match=r"shard-0.tar: 000000000.latent.pt is refused: its pickle asks for posix.system"
    ):
        shard.read(0)
    assert not (tmp_path / "canary").exists()


def test_members_that_are_no_tensors_of_a_sample(tmp_path):
    s = sample(0)
    wrong = {
        "latent.pt": (bare(np.zeros((3, 4), np.float32)), r"latents have shape \(3, 4\)"),
        "embed.pt": (bare(np.zeros((1, 3, 4), np.float32)), r"text has shape \(1, 3, 4\)"),
        "latent.pt ": (bare(np.zeros(1, np.float32), shape=(1 << 40, 8), strides=(0, 0)), "repeats the numbers"),
        "prompt.txt": (b"\xff", "decode"),
    }
    for i, (field, (data, why)) in enumerate(wrong.items()):
        members = dict(members_of(s)) | {f"{s.key}.{field.strip()}": data}
        shard = open_shard(write_tar(tmp_path / f"shard-{i}.tar", [*members.items()]))
        with pytest.raises(ValueError, match=rf"shard-{i}.tar: .*{why}"):
            shard.read(0)


def test_finding_shards(tmp_path):
    for name in (
        "shard-00001.tar",
        "shard_000000.tar",
        "shard-00000.tar",
        "other.tar",
        ".shard-2.part.tar",
        "shard-3.tar.tmp",
    ):
        (tmp_path / name).touch()
    found = find_shards(tmp_path)
    assert [p.rpartition("/")[2] for p in found] == ["shard-00000.tar", "shard-00001.tar", "shard_000000.tar"]
    assert find_shards(found[0]) == found[:1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no shard\*.tar"):
        find_shards(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        find_shards(tmp_path / "absent")
