"""Captions of videos: beside them, or in a table."""

import json

import pytest

from rcm_jax.data.prepare.captions import Captions, NoCaption, find_videos, read_table


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mp4", "a/c.MOV", "a/d.webm", "e.mkv", ".hidden.mp4", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_videos_are_found_below_the_folder_in_name_order(folder):
    assert find_videos(folder) == ["a/c.MOV", "a/d.webm", "b.mp4", "e.mkv"]
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no videos; their names end in \.mp4"):
        find_videos(folder / "empty")
    with pytest.raises(FileNotFoundError, match="no folder of videos at .*nowhere"):
        find_videos(folder / "nowhere")


def test_captions_beside_the_videos(folder):
    (folder / "b.txt").write_text("a red fox\nin the snow\n")
    (folder / "a" / "c.json").write_text(json.dumps({"cap": ["a cat", "another"], "fps": 16}))
    (folder / "a" / "d.json").write_text('"a boat"')
    (folder / "e.txt").write_text(" \n")
    found = Captions(folder)
    assert [found.of(name) for name in ("b.mp4", "a/c.MOV", "a/d.webm")] == ["a red fox in the snow", "a cat", "a boat"]
    with pytest.raises(NoCaption, match="its caption is empty"):
        found.of("e.mkv")
    for name, written, words in (
        ("b.txt", None, "no caption: there is no b.txt or b.json beside it"),
        ("b.json", '{"fps": 3}', "it has none of caption, cap, text, prompt; it has fps"),
        ("b.json", "{", "its caption cannot be read"),
        ("b.json", '{"caption": 3}', "its caption is no text"),
    ):
        (folder / name).unlink(missing_ok=True)
        if written is not None:
            (folder / name).write_text(written)
        with pytest.raises(NoCaption, match=words):
            found.of("b.mp4")
    (folder / "b.txt").write_bytes("grün".encode("latin1"))
    with pytest.raises(NoCaption, match="line 1: byte 0xfc is not UTF-8"):
        found.of("b.mp4")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'Path,caption\nb.mp4,"a red fox, in the snow"\na/c.MOV,a cat\ne.mkv,\n'),
        ("t.tsv", "file_name\ttext\nb.mp4\ta red fox, in the snow\na/c.MOV\ta cat\ne.mkv\t\n"),
        ("t.jsonl", '{"path": "b.mp4", "cap": ["a red fox, in the snow"]}\n\n{"path": "a/c.MOV", "caption": "a cat"}\n'
                    '{"path": "e.mkv", "caption": ""}\n'),
    ],
)  # fmt: skip
def test_captions_in_a_table(folder, name, text):
    (folder / name).write_text(text)
    (folder / "b.txt").write_text("not asked for")
    found = Captions(folder, folder / name)
    assert [found.of(video) for video in ("b.mp4", "a/c.MOV")] == ["a red fox, in the snow", "a cat"]
    with pytest.raises(NoCaption, match=rf"no caption: .*{name} does not name it"):
        found.of("a/d.webm")
    with pytest.raises(NoCaption, match="its caption is empty"):
        found.of("e.mkv")


def test_paths_of_a_table_may_be_whole(folder):
    (folder / "t.csv").write_text(f"video,prompt\n{folder / 'b.mp4'},a fox\nd.webm,a boat\n")
    found = Captions(folder, folder / "t.csv")
    assert [found.of(video) for video in ("b.mp4", "a/d.webm")] == ["a fox", "a boat"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "t.csv",
            "path,words\nb.mp4,fox\n",
            "t.csv, line 2: it has none of caption, cap, text, prompt; it has pa",
        ),
        ("t.csv", "name,caption\nb.mp4,fox\n", "line 2: it has none of path, file, file_name"),
        ("t.csv", "path,caption\nb.mp4,fox\nb.mp4,dog\n", "line 3: b.mp4 has another caption above"),
        ("t.jsonl", '{"path": "b.mp4", "caption": "fox"}\n{\n', "line 2: it is not JSON"),
        ("t.jsonl", "\n", "t.jsonl has no rows"),
    ],
)
def test_tables_that_are_none(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_table(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="captions=.*none.csv is not there"):
        read_table(tmp_path / "none.csv")
