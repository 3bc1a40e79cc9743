"""The videos of a folder and what is said of them: NAME.txt or NAME.json beside NAME.mp4, or one table for all."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rcm_jax.errors import ArgumentError, MissingFileError
from rcm_jax.media.clips import SUFFIXES
from rcm_jax.worlds.prompts_file import read_text

PATHS = ("path", "file", "file_name", "filename", "video", "video_path")  # names of a table's columns
CAPTIONS = ("caption", "cap", "text", "prompt")  # and of a JSON file's entry; the first that is there counts


class NoCaption(ValueError):
    """The message says what was looked for, without the video's name."""


def find_videos(folder: str | Path) -> list[str]:
    """The videos below a folder, in name order, as paths from it. Raises ArgumentError where there are none."""
    root = Path(folder)
    if not root.is_dir():
        raise MissingFileError(f"there is no folder of videos at {root}")
    found = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    if not found:
        raise ArgumentError(f"{root} has no videos; their names end in {', '.join(SUFFIXES)}")
    return found


class Captions:
    """Of a folder's videos, by their paths from it. Raises ArgumentError for a table that is none."""

    def __init__(self, folder: str | Path, table: Path | None = None):
        self.folder, self._table = Path(folder), table
        self._rows = None if table is None else read_table(table)

    def of(self, video: str) -> str:
        """Raises NoCaption."""
        found = self._beside(video) if self._rows is None else self._in_table(video)
        if not (text := " ".join(found.split("\n")).strip()):
            raise NoCaption("its caption is empty")
        return text

    def _in_table(self, video: str) -> str:
        path = self.folder / video
        for name in (video, str(path), str(path.resolve()), Path(video).name):
            if name in self._rows:
                return self._rows[name]
        raise NoCaption(f"no caption: {self._table} does not name it")

    def _beside(self, video: str) -> str:
        path = self.folder / video
        text, entry = path.with_suffix(".txt"), path.with_suffix(".json")
        try:
            if text.is_file():
                return read_text(text)
            if entry.is_file():
                value = json.loads(read_text(entry))
                return _caption(value if isinstance(value, dict) else {"caption": value})
        except ValueError as error:
            raise NoCaption(f"its caption cannot be read: {error}") from error
        raise NoCaption(f"no caption: there is no {text.name} or {entry.name} beside it")


def _caption(row: Mapping[str, Any]) -> str:
    """Of a row or a JSON object; of several captions the first."""
    names = [name for name in CAPTIONS if name in row]
    if not names:
        raise ValueError(f"it has none of {', '.join(CAPTIONS)}; it has {', '.join(map(str, row)) or 'nothing'}")
    value = next((row[name] for name in names if row[name]), "")
    value = value[0] if isinstance(value, list) else value
    if not isinstance(value, str):
        raise ValueError(f"its {names[0]} is no text")
    return value


def read_table(path: Path) -> dict[str, str]:
    """Captions by paths, of a .csv, .tsv or .jsonl file. Raises ArgumentError that names the line."""
    if not path.is_file():
        raise MissingFileError("{captions} is not there", captions=path)
    try:
        text, out = read_text(path), {}
    except ValueError as error:
        raise ArgumentError(f"{{captions}}, {error}", captions=path) from error
    for line, row in _jsonl(text, path) if path.suffix == ".jsonl" else _cells(text, path):
        try:
            named = next((row[name] for name in PATHS if row.get(name)), None)
            if not isinstance(named, str):
                raise ValueError(f"it has none of {', '.join(PATHS)}; it has {', '.join(map(str, row)) or 'nothing'}")
            name = Path(named).as_posix()
            caption = _caption(row)
            if out.setdefault(name, caption) != caption:
                raise ValueError(f"{name} has another caption above")
        except ValueError as error:
            raise ArgumentError(f"{{captions}}, line {line}: {error}", captions=path) from error
    if not out:
        raise ArgumentError("{captions} has no rows", captions=path)
    return out


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, words in enumerate(text.splitlines(), 1):
        if words.strip():
            try:
                row = json.loads(words)
            except ValueError as error:
                raise ArgumentError(f"{{captions}}, line {line}: it is not JSON: {error}", captions=path) from error
            yield line, row if isinstance(row, dict) else {}


def _cells(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ",")
    rows.fieldnames = [str(name).strip().lower() for name in rows.fieldnames or ()]
    for row in rows:
        yield rows.line_num, {name: value for name, value in row.items() if name is not None}
