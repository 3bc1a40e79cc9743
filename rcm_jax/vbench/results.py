"""VBench's results, `{dimension: [score, [{"video_path": …, "video_results": …}, …]]}`, of one file or of several."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm_jax.vbench.files import read_json, told
from rcm_jax.vbench.prompts import Entry, file_stem
from rcm_jax.vbench.suites import SUITES, Suite

# of which VBench asks for more samples, and keeps the first few that move
FILTERED = ("temporal_flickering",)


@dataclasses.dataclass(frozen=True)
class Results:
    """raw: a fraction for each dimension. videos: the names of the files that it was measured on, None for one that has
    no name."""

    suite: Suite
    raw: Mapping[str, float]
    videos: Mapping[str, tuple[str | None, ...]]

    @property
    def missing(self) -> tuple[str, ...]:
        """Dimensions without a score."""
        return self.suite.missing(self.raw)

    def complete(self) -> None:
        """Raises ValueError that names the dimensions that are missing."""
        if self.missing:
            raise ValueError(
                f"{self.suite.title} has {len(self.suite.names)} dimensions, and of {', '.join(self.missing)} there is "
                "no result: give their files too, or --partial for the mean of those that there are"
            )

    def check_videos(self, entries: Sequence[Entry], samples: int) -> None:
        """Raises ValueError where a dimension was not measured on its prompts' `samples` videos and nothing else; what
        is missing or too much it names."""
        for name, videos in self.videos.items():
            listed = self._listed(name, entries)
            if not videos:
                raise ValueError(f"{name} has a score and no videos: what it was measured on cannot be checked")
            unnamed = videos.count(None)
            if unnamed:
                raise ValueError(f"{name}: {unnamed} of its {len(videos)} videos have no video_path")
            if name in FILTERED:
                self._check_counts(name, listed, samples)
            else:
                self._check_numbers(name, listed, samples)

    def _listed(self, name: str, entries: Sequence[Entry]) -> list[str]:
        """How the videos of a dimension's prompts begin: of those that name it or, in lists that name it nowhere, those
        of the suite that it is measured on."""
        own = [file_stem(entry) for entry in entries if name in entry.dimensions]
        if own:
            return own
        suite = self.suite[name].suite
        found = [file_stem(entry) for entry in entries if suite and suite in entry.dimensions]
        if not found:
            raise ValueError(f"{name} has a score, and no prompt of the list is for it: give the list that was sampled")
        return found

    def _samples(self, name: str, listed: Sequence[str]) -> dict[str, list[int]]:
        """The numbers of each prompt's videos. Raises ValueError for videos of no prompt."""
        found: dict[str, list[int]] = {stem: [] for stem in listed}
        strange = []
        for video in filter(None, self.videos[name]):
            stem, number = _sample_of(video)
            if number is None or stem not in found:
                strange.append(video)
            else:
                found[stem].append(number)
        if strange:
            raise ValueError(
                f"{name}: {_some(strange)} {_are(strange)} of no prompt of the list that is measured in it"
            )
        return found

    def _check_numbers(self, name: str, listed: Sequence[str], samples: int) -> None:
        found = self._samples(name, listed)
        beyond = [f"{stem}-{i}" for stem, numbers in found.items() for i in numbers if i >= samples]
        if beyond:
            raise ValueError(f"{name}: {_some(beyond)} {_are(beyond)} past the {samples} samples of a prompt")
        missing = [f"{stem}-{i}.mp4" for stem, numbers in found.items() for i in range(samples) if i not in numbers]
        if missing:
            raise ValueError(
                f"{name}: {_some(missing)} {_are(missing)} not among its {len(self.videos[name])} videos: sample and "
                "measure what is missing"
            )

    def _check_counts(self, name: str, listed: Sequence[str], samples: int) -> None:
        wrong = {stem: len(n) for stem, n in self._samples(name, listed).items() if len(n) != samples}
        for stem, count in wrong.items():
            raise ValueError(f"{name}: of {stem!r} there are {count} videos, not {samples} ({len(wrong)} such prompts)")


def read_results(paths: Iterable[str | Path], suite: str | None = None, *, partial: bool = False) -> Results:
    """suite: `t2v` or `i2v` (default: what the dimensions say). partial: whether some may be missing, so that few may
    not say it.

    Raises ValueError for a file that is none, of another benchmark, or with a dimension that another file has, and for
    a video that is there twice.
    """
    found: dict[str, tuple[float, tuple[str | None, ...]]] = {}
    where: dict[str, Path] = {}
    for path in map(Path, paths):
        for name, entry in _read(path).items():
            if name in found:
                raise ValueError(f"{name} is in {where[name]} and in {path}: give one of them")
            found[name], where[name] = _checked(path, name, entry), path
    known = {name for each in SUITES.values() for name in each.names}
    strange = [name for name in found if name not in known]
    if strange:
        raise ValueError(
            f"{where[strange[0]]} has {', '.join(strange)}, which is of another version of VBench: what adds up to its "
            f"score are {', '.join(SUITES['t2v'].names)}"
        )
    fitting = [each for each in SUITES.values() if found.keys() <= set(each.names)]
    if suite is None and partial and len(fitting) > 1:
        raise ValueError(
            f"{', '.join(found)}: text and image to video both have {'it' if len(found) == 1 else 'them'}: give "
            f"--suite {' or '.join(SUITES)}"
        )
    chosen = SUITES[suite] if suite else max(SUITES.values(), key=lambda s: len(found.keys() & set(s.names)))
    others = [name for name in found if name not in chosen.names]
    if others:
        raise ValueError(
            f"{where[others[0]]}: {chosen.title} has no {', '.join(others)}: give the results of one suite"
        )
    for name, (_, videos) in found.items():
        _check_once(name, videos)
    there = [name for name in chosen.names if name in found]
    return Results(chosen, {name: found[name][0] for name in there}, {name: found[name][1] for name in there})


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold {{dimension: [score, videos]}}, as VBench's *_eval_results.json do")
    return content


def _checked(path: Path, name: str, entry: Any) -> tuple[float, tuple[str | None, ...]]:
    """Score, and the names of its videos."""
    score, videos = entry if _pair(entry) else (entry, [])
    if not isinstance(score, int | float) or isinstance(score, bool) or score != score:
        raise ValueError(f"{path}: {name} must be [score, videos], not {told(entry)}")
    if not 0 <= score <= 1:
        raise ValueError(
            f"{path}: {name}={told(score)} must be a fraction from 0 to 1, as VBench writes it; tables print percent"
        )
    names = [video.get("video_path") for video in videos]
    strange = next((value for value in names if value is not None and not isinstance(value, str)), None)
    if strange is not None:
        raise ValueError(f"{path}: a video_path of {name} must be a text, not {told(strange)}")
    return float(score), tuple(Path(value).name if value else None for value in names)


def _check_once(name: str, videos: Sequence[str | None]) -> None:
    by_sample: dict[str, list[str]] = collections.defaultdict(list)
    for video in filter(None, videos):
        by_sample[Path(video).stem].append(video)
    twice = [same for same in by_sample.values() if len(same) > 1]
    if twice:
        files = list(dict.fromkeys(video for same in twice for video in same))
        raise ValueError(f"{name}: {_some(files)} {_are(files)} there twice: one file of a sample, no other")


def _sample_of(video: str) -> tuple[str, int | None]:
    """How a video's prompt is written in its name, and the number; None for what is not named so."""
    match = re.fullmatch(r"(.*)-(0|[1-9][0-9]{0,8})", Path(video).stem, re.DOTALL)
    return (match[1], int(match[2])) if match else (video, None)


def _pair(entry: Any) -> bool:
    return (
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)
        and all(isinstance(video, dict) for video in entry[1])
    )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
