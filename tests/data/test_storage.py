"""Files at addresses: read in parts, asked for again, and not for ever."""

import threading
import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rcm_jax.data import storage
from rcm_jax.data.shard_files import find_shards, open_shard, write_shard
from tests.data.test_shard_files import same, sample

BEHAVIOUR = {"stalls": 0, "fails": 0, "short": 0, "asked": 0}
over = threading.Event()


class Troubled(MemoryFileSystem):
    """A server that does not answer, breaks off or fails, so many times."""

    protocol = "troubled"
    store, pseudo_dirs, cachable = {}, [""], False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("troubled://").strip("/")

    def cat_file(self, path, start=None, end=None, **kwargs):
        BEHAVIOUR["asked"] += 1
        for trouble in ("stalls", "fails", "short"):
            if BEHAVIOUR[trouble] > 0:
                BEHAVIOUR[trouble] -= 1
                if trouble == "stalls":
                    over.wait(60)
                if trouble == "fails":
                    raise ConnectionResetError("the other side has gone")
                return super().cat_file(path, start, end - 1)
        return super().cat_file(path, start, end, **kwargs)


@pytest.fixture
def address(tmp_path, monkeypatch):
    """A shard of three samples there."""
    fsspec.register_implementation("troubled", Troubled, clobber=True)
    BEHAVIOUR.update(stalls=0, fails=0, short=0, asked=0)
    over.clear()
    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    monkeypatch.setattr(storage, "PAUSE", 0.0)
    monkeypatch.setenv("RCM_JAX_CACHE", str(tmp_path / "cache" / "here"))
    write_shard(tmp_path / "shard-000000.tar", [sample(i) for i in range(3)])
    system = Troubled()
    for file in tmp_path.glob("shard*"):
        system.pipe_file(f"/set/{file.name}", file.read_bytes())
    system.pipe_file("/set/manifest.json", b"{}")
    yield "troubled://set"
    over.set()
    Troubled.store.clear()


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_at_an_address(address, indexed):
    if not indexed:
        Troubled().rm_file("/set/shard-000000.tar.index.json")
    (found,) = find_shards(address)
    assert found.startswith("troubled://")
    shard = open_shard(found)
    assert shard.broken == ()
    BEHAVIOUR["asked"] = 0
    for i in range(3):
        same(shard.read(i), sample(i))
    assert BEHAVIOUR["asked"] == 3  # one request a sample


def test_headers_without_an_index_are_asked_for_once(address, tmp_path):
    Troubled().rm_file("/set/shard-000000.tar.index.json")
    name = find_shards(address)[0]

    def asked() -> int:
        BEHAVIOUR["asked"] = 0
        assert open_shard(name).keys == tuple(f"{i:09d}" for i in range(3))
        return BEHAVIOUR["asked"]

    first, again = asked(), asked()
    assert first > again == 1  # for an index, which is not there
    (kept,) = (tmp_path / "cache").rglob("*.index.json")
    kept.write_text("{")
    assert asked() == first
    time.sleep(0.01)
    Troubled().pipe_file("/set/shard-000000.tar", (tmp_path / "shard-000000.tar").read_bytes())  # another file
    assert asked() == first


@pytest.mark.parametrize("trouble", ["stalls", "fails", "short"])
def test_a_server_in_trouble_is_asked_again_and_then_named(address, trouble):
    shard = open_shard(find_shards(address)[0])
    BEHAVIOUR[trouble] = 2
    same(shard.read(1), sample(1))
    BEHAVIOUR.update({trouble: 99, "asked": 0})
    began = time.monotonic()
    why = {"stalls": "no answer within 0.2 s", "fails": "ConnectionResetError: the other side", "short": "bytes came"}
    with pytest.raises(
        OSError, match=rf"troubled://.*shard-000000.tar cannot be read: .*{why[trouble]}.*; asked 3 times"
    ):
        shard.read(1)
    assert BEHAVIOUR["asked"] == 3
    assert time.monotonic() - began < 5


def test_addresses_that_lead_nowhere(address):
    with pytest.raises(ValueError, match="nonsense://x cannot be opened: Protocol not known"):
        find_shards("nonsense://x")
    with pytest.raises(FileNotFoundError):
        find_shards("troubled://absent")
    with pytest.raises(FileNotFoundError):
        open_shard("troubled://set/absent.tar")
