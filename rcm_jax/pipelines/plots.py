"""Plots of a run and of scores, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rcm_jax.pipelines.preview import SCORED_STEPS, read_previews
from rcm_jax.training.metrics import read_metrics

# What moves while a network is distilled. Not sCM's loss: it is the square of a normalised tangent, hence constant.
LOSSES = {"tangent_norm": "norm of sCM's tangent", "loss_dmd": "DMD loss", "loss_critic": "critic loss"}
COLOURS = {"teacher": "tab:blue", "student": "tab:red"}
RIGHT = "share of videos that are right"
LABELS = 13  # points


class Point(NamedTuple):
    """A network at a number of steps: passes for a video, and the interval of its score."""

    label: str
    passes: float
    score: Mapping[str, float]

    @property
    def error(self) -> tuple[float, float]:
        return self.score["value"] - self.score["low"], self.score["high"] - self.score["value"]


def pyplot() -> Any:
    """matplotlib without a window; slow to import."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_training(workdir: Path, path: Path) -> Path:
    """What moves over a run's steps: losses with their running means, and the scores of its previews."""
    plt = pyplot()
    records, previews = read_metrics(workdir), read_previews(workdir)
    names = [name for name in LOSSES if any(name in record for record in records)]
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(3.6 * (len(names) + 1), 3.2), layout="constrained")
    for axis, name in zip(np.atleast_1d(axes), names, strict=False):
        steps, values = np.array([(r["step"], r[name]) for r in records if name in r]).T
        window = max(1, len(values) // 20)
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(steps, values, color="0.8", linewidth=0.7)
        axis.plot(steps[window - 1 :], mean, color="0.2")
        axis.set(title=LOSSES[name], xlabel="step", ylim=(0, None))
    _plot_previews(np.atleast_1d(axes)[-1], previews)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _plot_previews(axis: Any, previews: Sequence[dict]) -> None:
    """The previews' scores with their intervals, a line for every number of sampler steps."""
    for num_steps, style in zip(SCORED_STEPS, ("o-", "s--"), strict=True):
        line = [record for record in previews if record["num_steps"] == num_steps]
        steps = [record["step"] for record in line]
        value, low, high = ([record["all"][name] for record in line] for name in ("value", "low", "high"))
        label = f"in {num_steps} step{'s' * (num_steps > 1)}"
        axis.plot(steps, value, style, color=COLOURS["student"], markersize=4, label=label)
        axis.fill_between(steps, low, high, color=COLOURS["student"], alpha=0.12, linewidth=0)
    axis.set(title="student's videos that are right", xlabel="step", ylim=(0, 1.02))
    axis.legend(loc="lower right", frameon=False)


def plot_quality(curves: Mapping[str, Sequence[Point]], data: float, path: Path) -> Path:
    """`draw_quality` as a PNG file, of a size for slides."""
    figure = draw_quality(curves, data)
    figure.savefig(path, dpi=140)
    pyplot().close(figure)
    return path


def draw_quality(curves: Mapping[str, Sequence[Point]], data: float) -> Any:
    """A figure of scores against passes for a video: a line a network, each point named; the world's own videos, whose
    score is `data`, as a level."""
    figure, axis = pyplot().subplots(figsize=(9, 5.4), layout="constrained")
    axis.set_xscale("log")
    axis.axhline(data, color="0.5", linestyle=":", linewidth=2)
    axis.annotate(
        "the world's own videos", (0.99, data), xycoords=("axes fraction", "data"), xytext=(0, -6),
        textcoords="offset points", ha="right", va="top", fontsize=LABELS, color="0.4",
    )  # fmt: skip
    # networks of equal cost stand beside each other, not upon
    for (name, points), aside in zip(curves.items(), np.geomspace(1.025, 1 / 1.025, len(curves)), strict=True):
        _plot_curve(axis, name, points, aside)
    ticks = sorted({point.passes for points in curves.values() for point in points})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlim=(min(ticks) * 0.5, max(ticks) * 5), ylim=(0, 1.05))
    axis.set_xlabel("network passes for a video (a guided step takes two)", fontsize=15)
    axis.set_ylabel(RIGHT, fontsize=15)
    axis.tick_params(labelsize=LABELS)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _plot_curve(axis: Any, name: str, points: Sequence[Point], aside: float) -> None:
    """A network's line; a teacher's points are named on their right, a student's, which cost less, on their left."""
    colour, left = COLOURS[name], name == "student"
    passes, heights = [point.passes * aside for point in points], [point.score["value"] for point in points]
    errors = np.transpose([point.error for point in points])
    axis.errorbar(passes, heights, yerr=errors, fmt="o-", color=colour, markersize=9, linewidth=2.5, capsize=4)
    for x, y, point in zip(passes, heights, points, strict=True):
        axis.annotate(
            point.label, (x, y), xytext=(-10, 10) if left else (10, -10), textcoords="offset points", color=colour,
            ha="right" if left else "left", va="bottom" if left else "top", fontsize=LABELS,
        )  # fmt: skip
