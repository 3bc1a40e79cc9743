"""VBench's results, `{dimension: [score, [{"video_path": …, "video_results": …}, …]]}`, of one file or of several."""

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm_jax.vbench.prompts import Entry, video_names
from rcm_jax.vbench.suites import SUITES, Suite


@dataclasses.dataclass(frozen=True)
class Results:
    """raw: a fraction for each dimension. videos: the names of the files that it was measured on."""

    suite: Suite
    raw: Mapping[str, float]
    videos: Mapping[str, tuple[str, ...]]

    def complete(self) -> None:
        """Raises ValueError that names the dimensions that are missing."""
        missing = [name for name in self.suite.names if name not in self.raw]
        if missing:
            raise ValueError(
                f"{self.suite.title} has {len(self.suite.names)} dimensions, and of {', '.join(missing)} there is no "
                "result: give their files too, or --partial for the mean of those that there are"
            )

    def check_videos(self, entries: Sequence[Entry], samples: int) -> None:
        """Raises ValueError for a prompt of which a sample is missing, or there twice, in a dimension's videos; which
        of them it names."""
        for name, videos in self.videos.items():
            dimension = self.suite[name]
            seen = collections.Counter(videos)
            twice = [video for video, count in seen.items() if count > 1]
            if twice:
                raise ValueError(f"{name}: {_some(twice)} {_are(twice)} there twice: one file of a sample, no other")
            listed = {dimension.suite or name, name}
            wanted = [v for e in entries if listed & set(e.dimensions) for v in video_names(e, samples)]
            missing = [video for video in wanted if video not in seen]
            if missing:
                raise ValueError(
                    f"{name}: {_some(missing)} {_are(missing)} not among its {len(seen)} videos: sample and measure "
                    "what is missing"
                )


def read_results(paths: Iterable[str | Path], suite: str | None = None) -> Results:
    """suite: `t2v` or `i2v` (default: what the dimensions say).

    Raises ValueError for a file that is none, of another benchmark, or with a dimension that another file has.
    """
    found: dict[str, tuple[float, tuple[str, ...]]] = {}
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
    chosen = SUITES[suite] if suite else max(SUITES.values(), key=lambda s: len(found.keys() & set(s.names)))
    others = [name for name in found if name not in chosen.names]
    if others:
        raise ValueError(
            f"{where[others[0]]}: {chosen.title} has no {', '.join(others)}: give the results of one suite"
        )
    raw = {name: found[name][0] for name in chosen.names if name in found}
    return Results(chosen, raw, {name: found[name][1] for name in raw if found[name][1]})


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError:
        raise
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold {{dimension: [score, videos]}}, as VBench's *_eval_results.json do")
    return content


def _checked(path: Path, name: str, entry: Any) -> tuple[float, tuple[str, ...]]:
    """Score, and the names of its videos."""
    score, videos = (
        (entry, []) if isinstance(entry, int | float) else (entry[0], entry[1]) if _pair(entry) else (None, [])
    )
    if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
        raise ValueError(f"{path}: {name} must be [score, videos], not {str(entry)[:60]}")
    if not 0 <= score <= 1:
        raise ValueError(
            f"{path}: {name}={score} must be a fraction from 0 to 1, as VBench writes it; tables print percent"
        )
    return float(score), tuple(Path(video["video_path"]).name for video in videos if "video_path" in video)


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
