"""VBench's lists of prompts, in its own form and in rCM's, and what their videos' files are called."""

import collections
import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rcm_jax.vbench.files import read_json, told
from rcm_jax.vbench.suites import I2V, SUITES

WORDS = ("prompt_en", "prompt")  # VBench's key, rCM's
DIMENSIONS = ("dimension", "dimensions")
OF_IMAGES = tuple(dimension.name for dimension in I2V.dimensions if dimension.group == "i2v")
LONGEST = 255  # bytes of a file's name


@dataclasses.dataclass(frozen=True)
class Entry:
    """prompt: what files are named by. augmented: the longer one that may be sampled in its place. image: of an
    image-to-video prompt, the name of its file. auxiliary: what VBench needs to measure it. image_type: of VBench's
    list of images, handed on."""

    prompt: str
    dimensions: tuple[str, ...]
    augmented: str | None = None
    image: str | None = None
    auxiliary: dict[str, Any] | None = None
    image_type: str | None = None


def read_prompts(path: str | Path) -> list[Entry]:
    """A prompt once, in the order of the list: one that is in it several times, for other dimensions, is one set of
    videos.

    Raises ValueError for a list that is none, for prompts without dimensions, or with such as VBench does not know, and
    for what is of another type than it should be.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} must be a list of {{prompt_en, dimension}}, as VBench_full_info.json is")
    merged: dict[tuple[str, str | None], Entry] = {}
    for number, item in enumerate(content):
        where = f"{path}, entry {number}"
        entry = _entry(where, item)
        before = merged.get(key := (entry.prompt, entry.image))
        merged[key] = entry if before is None else _joined(where, before, entry)
    named = collections.Counter(file_stem(entry) for entry in merged.values())
    same = next((stem for stem, count in named.items() if count > 1), None)
    if same is not None:
        raise ValueError(
            f"{path}: two prompts' videos are called {same + '-0.mp4'!r}: they differ in what no name can hold"
        )
    return list(merged.values())


def _entry(where: str, item: Any) -> Entry:
    found = item if isinstance(item, dict) else {}
    prompt = next((found[key] for key in WORDS if isinstance(found.get(key), str) and found[key].strip()), None)
    if prompt is None:
        raise ValueError(f"{where}: there is no prompt_en (or prompt): {told(item)}")
    image = _text(where, item, "image_name")
    dimensions = _dimensions(where, prompt, item)
    from_image = next((name for name in dimensions if name in OF_IMAGES), None)
    if from_image is not None and image is None:
        raise ValueError(f"{where}: {prompt!r} has no image_name, and {from_image} is measured against an image")
    auxiliary = item.get("auxiliary_info")
    if auxiliary is not None and not isinstance(auxiliary, dict):
        raise ValueError(f"{where}: auxiliary_info must be {{dimension: …}}, not {told(auxiliary)}")
    return Entry(
        prompt, dimensions, _text(where, item, "augmented_prompt"), image, auxiliary, _text(where, item, "image_type")
    )


def _text(where: str, item: dict[str, Any], key: str) -> str | None:
    """None where there is none, or an empty one."""
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a text, not {told(value)}")
    return value if value and value.strip() else None


def _dimensions(where: str, prompt: str, item: dict[str, Any]) -> tuple[str, ...]:
    found = next((item[key] for key in DIMENSIONS if item.get(key)), None)
    if not found:
        raise ValueError(f"{where}: {prompt!r} has no dimension to be measured in")
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: dimension must be a name or a list of names, not {told(found)}")
    known = {name for suite in SUITES.values() for name in suite.names}
    strange = [name for name in names if name not in known]
    if strange:
        raise ValueError(f"{where}: {strange[0]!r} is no dimension of VBench's: {', '.join(sorted(known))}")
    return tuple(dict.fromkeys(names))


def _joined(where: str, one: Entry, other: Entry) -> Entry:
    if one.augmented and other.augmented and one.augmented != other.augmented:
        raise ValueError(
            f"{where}: {one.prompt!r} has another augmented_prompt here than before, and one set of videos: keep one"
        )
    dimensions = (*one.dimensions, *(name for name in other.dimensions if name not in one.dimensions))
    auxiliary = one.auxiliary if other.auxiliary is None else (one.auxiliary or {}) | other.auxiliary
    return dataclasses.replace(
        one, dimensions=dimensions, auxiliary=auxiliary, augmented=one.augmented or other.augmented,
        image_type=one.image_type or other.image_type,
    )  # fmt: skip


def file_stem(entry: Entry) -> str:
    """The prompt, but for what a file's name cannot hold."""
    return entry.prompt.replace("/", "-").replace("\n", " ")


def video_names(entry: Entry, samples: int) -> list[str]:
    """`PROMPT-0.mp4`, `PROMPT-1.mp4`, …"""
    return [f"{file_stem(entry)}-{i}.mp4" for i in range(samples)]


def check_names(entries: Sequence[Entry], samples: int) -> None:
    """Raises ValueError for a prompt that no file can be called by."""
    for entry in entries:
        stem = file_stem(entry)
        try:
            # the longest name: of the folder that keeps the frames of what could not be encoded
            size = len(f"{stem}-{samples - 1}_frames".encode())
        except UnicodeEncodeError:
            raise ValueError(f"{stem[:60]!r} has half a character: no file can be called so") from None
        if "\0" in stem:
            raise ValueError(f"{stem[:60]!r} has a NUL: no file can be called so")
        if size > LONGEST:
            raise ValueError(f"{stem[:60]!r}… is too long for a file's name ({LONGEST} bytes)")


def check_case(entries: Sequence[Entry], folder: Path) -> None:
    """Raises ValueError where the folder takes the videos of two prompts for one: on file systems to which upper and
    lower case are the same. One that is not there yet is as the first above it that is."""
    folded: dict[str, str] = {}
    pairs = [(folded[low], stem) for stem in map(file_stem, entries)
             if folded.setdefault(low := stem.casefold(), stem) != stem]  # fmt: skip
    if pairs and not _tells_case(next(f for f in (folder, *folder.parents) if f.exists())):
        one, other = pairs[0]
        raise ValueError(
            f"{folder} does not tell upper from lower case: videos of {one!r} would overwrite those of {other!r}; give "
            "a folder on another file system"
        )


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
        others = {"image_type": entry.image_type, "image_name": entry.image, "auxiliary_info": entry.auxiliary}
        out.append(record | {name: value for name, value in others.items() if value is not None})
    return out
