"""Scores beside published ones: as a table, and drawn."""

import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm_jax.outputs import unfinished
from rcm_jax.pipelines.plots import pyplot
from rcm_jax.vbench.suites import Suite

Row = Mapping[str, float]  # percent: raw dimensions, groups and total


def published(suite: Suite) -> dict[str, Row]:
    """Rows by their names, percent; those that were published as totals have few dimensions or none."""
    kept = json.loads(importlib.resources.files("rcm_jax.vbench").joinpath("published.json").read_text())
    rows = {}
    for row in [*kept[suite.name], *kept.get(f"{suite.name}_totals", ())]:
        name = f"{row['model']} ({row['protocol']})" if "protocol" in row else row["model"]
        raw = dict(zip(suite.names, row["scores"], strict=True)) if "scores" in row else row.get("dimensions", {})
        rows[name] = raw | {group: row[group] for group in (*suite.groups, "total")}
    return rows


def own_row(suite: Suite, raw: Mapping[str, float], *, clamp: bool = False) -> Row:
    """Percent."""
    scores = suite.scores(raw, clamp=clamp)
    totals = {name: scores[name] for name in (*suite.groups, "total") if name in scores}
    return {name: 100 * value for name, value in {**raw, **totals}.items()}


def outside(suite: Suite, raw: Mapping[str, float]) -> dict[str, float]:
    """Of raw fractions the normalised ones that are below 0 or above 1: what no model of VBench's had."""
    found = {name: suite[name].normalised(value) for name, value in raw.items()}
    return {name: value for name, value in found.items() if not 0 <= value <= 1}


def notes(suite: Suite, raw: Mapping[str, float], *, clamp: bool = False) -> list[str]:
    """Of one's own scores, what a table does not show."""
    missing = [_words(name) for name in suite.missing(raw)]
    lines = [f"partial: means of what there is, without {', '.join(missing)}"] if missing else []
    beyond = [f"{_words(name)} ({100 * value:.2f})" for name, value in outside(suite, raw).items()]
    if beyond:
        how = "clamped" if clamp else "not clamped"
        lines.append(f"outside of VBench's ranges, which are 0 to 100 once normalised, and {how}: {', '.join(beyond)}")
    return lines


def table(suite: Suite, rows: Mapping[str, Row], *, partial: bool = False) -> str:
    """Markdown: a column a row, since dimensions are many. partial: the first row is."""
    first, *others = rows
    names = [f"{first} (partial)" if partial else first, *others]
    lines = [f"| {suite.title} | {' | '.join(names)} |", "|---" * (1 + len(rows)) + "|"]
    for name in ("total", *suite.groups, *suite.names):
        cells = [f"{row[name]:.2f}" if name in row else "" for row in rows.values()]
        lines.append(f"| {_words(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(dimension: str) -> str:
    return dimension.replace("_", " ")


def nearest(rows: Mapping[str, Row], total: float, count: int) -> list[str]:
    """The published rows whose totals are nearest to it, best first."""
    by_distance = sorted(rows, key=lambda name: abs(rows[name]["total"] - total))
    return sorted(by_distance[:count], key=lambda name: -rows[name]["total"])


def radar(suite: Suite, rows: Mapping[str, Row], path: Path, *, clamp: bool = False) -> Path:
    """`draw_radar` as a file."""
    figure = draw_radar(suite, rows, clamp=clamp)
    with unfinished(path) as new:
        figure.savefig(new, dpi=140)
    pyplot().close(figure)
    return path


def draw_radar(suite: Suite, rows: Mapping[str, Row], *, clamp: bool = False) -> Any:
    """A figure of the first row, which must be whole, and of every other that is, normalised, around a circle. What
    lies outside of 0 to 100 widens it, and these two are circles then."""
    names = suite.names
    first, *others = rows
    drawn = {name: rows[name] for name in (first, *others) if name == first or all(d in rows[name] for d in names)}
    figure, axis = pyplot().subplots(figsize=(9, 8), layout="constrained", subplot_kw={"projection": "polar"})
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    low, high = 0.0, 100.0
    for i, (name, row) in enumerate(drawn.items()):
        normalised = suite.scores({d: row[d] / 100 for d in names}, clamp=clamp)
        heights = [100 * normalised[d] for d in names]
        low, high = min(low, *heights), max(high, *heights)
        axis.plot([*angles, angles[0]], [*heights, heights[0]], label=name, linewidth=2.5 if i == 0 else 1.2)
        if i == 0:
            axis.fill(angles, heights, alpha=0.12)
    axis.set_xticks(angles, [d.replace("_", "\n") for d in names], fontsize=9)
    for edge in (0.0, 100.0):
        if low < edge < high:
            axis.plot([2 * math.pi * i / 360 for i in range(361)], [edge] * 361, color="0.3", linestyle=":")
    axis.set_ylim(low, high)
    axis.legend(loc="lower right", bbox_to_anchor=(1.15, -0.08), frameon=False)
    return figure


def as_json(suite: Suite, raw: Mapping[str, float], *, clamp: bool, sources: Sequence[str]) -> dict[str, Any]:
    """Fractions, unrounded."""
    scores, missing = suite.scores(raw, clamp=clamp), suite.missing(raw)
    return {
        "suite": suite.name, "partial": bool(missing), "missing": list(missing), "clamped": clamp,
        "files": list(sources), "raw": dict(raw),
        "normalised": {name: scores[name] for name in suite.names if name in scores},
        **{name: scores[name] for name in (*suite.groups, "total") if name in scores},
    }  # fmt: skip
