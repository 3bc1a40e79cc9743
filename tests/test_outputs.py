"""Every output path is tried first, and trying leaves nothing behind."""

import errno
import os
import re
import tempfile
import threading

import pytest

from rcm_jax.errors import ArgumentError
from rcm_jax.outputs import check_folder, check_output, unfinished, write_first


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_path_that_can_be_written(tmp_path):
    assert check_output(tmp_path / "new" / "er" / "v.mp4", "save_path", (".mp4",)) == tmp_path / "new" / "er" / "v.mp4"
    assert names(tmp_path / "new" / "er") == []
    (tmp_path / "old.json").write_text("old")
    check_output(str(tmp_path / "old.json"), "json")
    assert (tmp_path / "old.json").read_text() == "old"
    check_folder(tmp_path / "not" / "there", "workdir")
    check_folder(tmp_path / "new", "workdir")
    assert names(tmp_path) == ["new", "old.json"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("v.avi", r"--save_path=.*v\.avi must end in \.mp4, \.gif or \.png"),
        ("v", r"--save_path=.*v must end in"),
        ("folder.mp4", r"cannot write --save_path=.*folder\.mp4: it is a folder; name a file in it"),
        ("file/v.mp4", r"cannot write --save_path=.*v\.mp4: \S*/file is a file; name a folder"),
        ("file/deeper/v.mp4", r": \S*/file is a file; name a folder"),
        ("/proc/v.mp4", r"nothing can be written in /proc \(.*\); give a path on a disk"),
        ("/proc/new/v.mp4", r"nothing can be written in /proc/new \("),
        ("pipe.mp4", r"it is a device or a pipe"),
    ],
)
def test_a_path_that_cannot(tmp_path, path, words):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    before = names(tmp_path)
    with pytest.raises(ArgumentError) as refused:
        check_output(tmp_path / path, "save_path", (".mp4", ".gif", ".png"))
    assert re.search(words, refused.value.as_flags())
    assert names(tmp_path) == before
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ArgumentError, match=r"cannot write workdir=.*: \S*/file is a file"):
            check_folder(path, "workdir")


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file")])
def test_a_disk_that_is_full_or_read_only(tmp_path, monkeypatch, number, words):
    """Whether the file cannot be made or not be filled."""

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, _):
            raise OSError(number, os.strerror(number))

    def fails(**_):
        raise OSError(number, os.strerror(number))

    for replacement in (fails, lambda **_: Full()):
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", replacement)
        with pytest.raises(ArgumentError, match=rf"cannot write out=.*/new/x: nothing can be written .*{words}"):
            check_output(tmp_path / "new" / "x", "out")
    assert names(tmp_path) == []


def test_a_file_that_may_not_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("mine")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    with pytest.raises(ArgumentError, match="json=.* it is there and read-only; give another name"):
        check_output(tmp_path / "x.json", "json")


def test_a_path_without_a_flag(tmp_path):
    with pytest.raises(ArgumentError, match=f"^cannot write {tmp_path}: it is a folder"):
        check_output(tmp_path, "")


def test_the_first_of_several_writes(tmp_path, monkeypatch):
    """With and without links, which not every file system has."""

    def no_links(*_):
        raise OSError(errno.EPERM, "no links")

    for name in ("linked", "plain"):
        first, barrier, texts = [], threading.Barrier(8), [letter * 10_000 for letter in "abcdefgh"]

        def write(text, path=tmp_path / name, first=first, barrier=barrier):
            barrier.wait()
            if write_first(path, text):
                first.append(text)

        threads = [threading.Thread(target=write, args=[text]) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [(tmp_path / name).read_text()] == first
        monkeypatch.setattr(os, "link", no_links)
    assert names(tmp_path) == ["linked", "plain"]


def test_names_of_files_that_several_write(tmp_path):
    """Short, whatever the file is called, and none is left of what fails."""
    path = tmp_path / f"{250 * 'x'}.mp4"
    with unfinished(path, shared=True) as new:
        new.write_text("whole")
    assert path.read_text() == "whole"
    with pytest.raises(FileNotFoundError), unfinished(path, shared=True) as new:
        new.write_text((tmp_path / "not there").read_text())
    assert (names(tmp_path), path.read_text()) == ([path.name], "whole")
