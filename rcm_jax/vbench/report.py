"""Scores beside published ones: as a table, and drawn."""

import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm_jax.pipelines.plots import pyplot
from rcm_jax.vbench.suites import Suite

Row = Mapping[str, float]  # percent: raw dimensions, groups and total


def published(suite: Suite) -> dict[str, Row]:
    """Rows by their names, percent; those that were published as totals alone have no dimensions."""
    kept = json.loads(importlib.resources.files("rcm_jax.vbench").joinpath("published.json").read_text())
    rows = {}
    for row in [*kept[suite.name], *kept.get(f"{suite.name}_totals", ())]:
        name = f"{row['model']} ({row['protocol']})" if "protocol" in row else row["model"]
        raw = dict(zip(suite.names, row["scores"], strict=True)) if "scores" in row else {}
        rows[name] = raw | {group: row[group] for group in (*suite.groups, "total")}
    return rows


def own_row(suite: Suite, raw: Mapping[str, float], *, clamp: bool = False) -> Row:
    """Percent."""
    scores = suite.scores(raw, clamp=clamp)
    totals = {name: scores[name] for name in (*suite.groups, "total") if name in scores}
    return {name: 100 * value for name, value in {**raw, **totals}.items()}


def table(suite: Suite, rows: Mapping[str, Row]) -> str:
    """Markdown: a column a row, since dimensions are many."""
    lines = [f"| {suite.title} | {' | '.join(rows)} |", "|---" * (1 + len(rows)) + "|"]
    for name in ("total", *suite.groups, *suite.names):
        cells = [f"{row[name]:.2f}" if name in row else "" for row in rows.values()]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def nearest(rows: Mapping[str, Row], total: float | None, count: int) -> list[str]:
    """The published rows whose totals are nearest to it, best first; the best where there is no total."""
    by_distance = sorted(
        rows, key=lambda name: -rows[name]["total"] if total is None else abs(rows[name]["total"] - total)
    )
    return sorted(by_distance[:count], key=lambda name: -rows[name]["total"])


def radar(suite: Suite, rows: Mapping[str, Row], path: Path) -> Path:
    """Every row that has all dimensions, normalised, around a circle."""
    names = suite.names
    drawn = {name: row for name, row in rows.items() if all(d in row for d in names)}
    if not drawn:
        raise ValueError("a radar plot needs every dimension: there is no whole row to draw")
    figure, axis = pyplot().subplots(figsize=(9, 8), layout="constrained", subplot_kw={"projection": "polar"})
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    for i, (name, row) in enumerate(drawn.items()):
        heights = [100 * suite[d].normalised(row[d] / 100) for d in names]
        axis.plot([*angles, angles[0]], [*heights, heights[0]], label=name, linewidth=2.5 if i == 0 else 1.2)
        if i == 0:
            axis.fill(angles, heights, alpha=0.12)
    axis.set_xticks(angles, [d.replace("_", "\n") for d in names], fontsize=9)
    axis.set_ylim(0, 100)
    axis.legend(loc="lower right", bbox_to_anchor=(1.15, -0.08), frameon=False)
    figure.savefig(path, dpi=140)
    pyplot().close(figure)
    return path


def as_json(suite: Suite, raw: Mapping[str, float], *, clamp: bool, sources: Sequence[str]) -> dict[str, Any]:
    """Fractions, unrounded."""
    scores = suite.scores(raw, clamp=clamp)
    return {
        "suite": suite.name, "clamped": clamp, "files": list(sources), "raw": dict(raw),
        "normalised": {name: scores[name] for name in suite.names if name in scores},
        **{name: scores[name] for name in (*suite.groups, "total") if name in scores},
    }  # fmt: skip
