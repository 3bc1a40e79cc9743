"""VBench's lists of prompts, in its own form and in rCM's, and what their videos' files are called."""

import collections
import dataclasses
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rcm_jax.vbench.suites import SUITES

WORDS = ("prompt_en", "prompt")  # VBench's key, rCM's
DIMENSIONS = ("dimension", "dimensions")


@dataclasses.dataclass(frozen=True)
class Entry:
    """prompt: what files are named by. augmented: the longer one that may be sampled in its place. image: of an
    image-to-video prompt, the name of its file. auxiliary: what VBench needs to measure it."""

    prompt: str
    dimensions: tuple[str, ...]
    augmented: str | None = None
    image: str | None = None
    auxiliary: Any = None


def read_prompts(path: str | Path) -> list[Entry]:
    """A prompt once, in the order of the list: one that is in it several times, for other dimensions, is one set of
    videos.

    Raises ValueError for a list that is none, for prompts without dimensions, or with such as VBench does not know.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} must be a list of {{prompt_en, dimension}}, as VBench_full_info.json is")
    merged: dict[tuple[str, str | None], Entry] = {}
    for number, item in enumerate(content):
        entry = _entry(path, number, item)
        before = merged.get(key := (entry.prompt, entry.image))
        merged[key] = entry if before is None else _joined(before, entry)
    named = collections.Counter(file_stem(entry) for entry in merged.values())
    same = next((stem for stem, count in named.items() if count > 1), None)
    if same is not None:
        raise ValueError(
            f"{path}: two prompts' videos are called {same + '-0.mp4'!r}: they differ in what no name can hold"
        )
    return list(merged.values())


def _entry(path: Path, number: int, item: Any) -> Entry:
    known = {name for suite in SUITES.values() for name in suite.names}
    item = item if isinstance(item, dict) else {}
    prompt = next((item[key] for key in WORDS if isinstance(item.get(key), str) and item[key].strip()), None)
    if prompt is None:
        raise ValueError(f"{path}, entry {number}: there is no prompt_en (or prompt): {str(item)[:60]}")
    dimensions = next((item[key] for key in DIMENSIONS if item.get(key)), None)
    dimensions = [dimensions] if isinstance(dimensions, str) else dimensions
    if not dimensions:
        raise ValueError(f"{path}, entry {number}: {prompt!r} has no dimension to be measured in")
    strange = [name for name in dimensions if name not in known]
    if strange:
        raise ValueError(
            f"{path}, entry {number}: {strange[0]!r} is no dimension of VBench's: {', '.join(sorted(known))}"
        )
    return Entry(
        prompt, tuple(dimensions), item.get("augmented_prompt") or None, item.get("image_name"),
        item.get("auxiliary_info"),
    )  # fmt: skip


def _joined(one: Entry, other: Entry) -> Entry:
    dimensions = (*one.dimensions, *(name for name in other.dimensions if name not in one.dimensions))
    auxiliary = one.auxiliary
    if isinstance(other.auxiliary, dict):
        auxiliary = (auxiliary or {}) | other.auxiliary
    return dataclasses.replace(
        one, dimensions=dimensions, auxiliary=auxiliary, augmented=one.augmented or other.augmented
    )


def file_stem(entry: Entry) -> str:
    """The prompt, but for what a file's name cannot hold."""
    return entry.prompt.replace("/", "-").replace("\n", " ")


def video_names(entry: Entry, samples: int) -> list[str]:
    """`PROMPT-0.mp4`, `PROMPT-1.mp4`, …"""
    return [f"{file_stem(entry)}-{i}.mp4" for i in range(samples)]


def check_names(entries: Sequence[Entry], folder: Path) -> None:
    """Raises ValueError where the folder, which is there, takes the videos of two prompts for one: on file systems to
    which upper and lower case are the same."""
    folded: dict[str, str] = {}
    pairs = [(folded[low], stem) for stem in map(file_stem, entries)
             if folded.setdefault(low := stem.casefold(), stem) != stem]  # fmt: skip
    if pairs and not _tells_case(folder):
        one, other = pairs[0]
        raise ValueError(
            f"{folder} does not tell upper from lower case: videos of {one!r} would overwrite those of {other!r}; give "
            "a folder on another file system"
        )
    long = next((stem for stem in map(file_stem, entries) if len(f"{stem}-00.mp4".encode()) > 255), None)
    if long is not None:
        raise ValueError(f"{long[:60]!r}… is too long for a file's name (255 bytes)")


def _tells_case(folder: Path) -> bool:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".rcm_jax_case") as tried:
        return not Path(folder, Path(tried.name).name.swapcase()).exists()


def measured_list(entries: Iterable[Entry], folder: Path, samples: int) -> list[dict[str, Any]]:
    """What VBench is run on: every prompt with its dimensions and its videos."""
    out = []
    for entry in entries:
        videos = [str(folder / name) for name in video_names(entry, samples)]
        record: dict[str, Any] = {
            "prompt_en": entry.prompt, "dimension": list(entry.dimensions), "video_list": videos
        }  # fmt: skip
        if entry.image is not None:
            record["image_name"] = entry.image
        out.append(record | ({} if entry.auxiliary is None else {"auxiliary_info": entry.auxiliary}))
    return out
