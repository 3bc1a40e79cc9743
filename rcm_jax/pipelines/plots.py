"""Plots of a run and of scores, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rcm_jax.pipelines.preview import SCORED_STEPS, read_previews
from rcm_jax.training.metrics import read_metrics

# What moves while a network is distilled. Not sCM's loss: it is the square of a normalised tangent, hence constant.
LOSSES = {"tangent_norm": "norm of sCM's tangent", "loss_dmd": "DMD loss", "loss_critic": "critic loss"}
COLOURS = {"teacher": "tab:gray", "student": "tab:red"}
RIGHT = "share of videos that are right"


class Point(NamedTuple):
    """A network at a number of steps: passes for a video, and the interval of its score."""

    label: str
    passes: float
    score: Mapping[str, float]

    @property
    def error(self) -> tuple[float, float]:
        return self.score["value"] - self.score["low"], self.score["high"] - self.score["value"]


def _pyplot() -> Any:
    """matplotlib without a window; slow to import."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_training(workdir: Path, path: Path) -> Path:
    """What moves over a run's steps: losses with their running means, and the scores of its previews."""
    plt = _pyplot()
    records, previews = read_metrics(workdir), read_previews(workdir)
    names = [name for name in LOSSES if any(name in record for record in records)]
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(3.6 * (len(names) + 1), 3.2), layout="constrained")
    for axis, name in zip(np.atleast_1d(axes), names, strict=False):
        steps, values = np.array([(r["step"], r[name]) for r in records if name in r]).T
        window = max(1, len(values) // 20)
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(steps, values, color="0.8", linewidth=0.7)
        axis.plot(steps[window - 1 :], mean, color="tab:blue")
        axis.set(title=LOSSES[name], xlabel="step", ylim=(0, None))
    _plot_previews(np.atleast_1d(axes)[-1], previews)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _plot_previews(axis: Any, previews: Sequence[dict]) -> None:
    """The previews' scores, a line for every number of sampler steps."""
    for num_steps, style in zip(SCORED_STEPS, ("o-", "s--"), strict=True):
        line = [Point("", r["step"], r["all"]) for r in previews if r["num_steps"] == num_steps]
        if line:
            heights = [point.score["value"] for point in line]
            label = f"in {num_steps} step{'s' * (num_steps > 1)}"
            axis.plot([p.passes for p in line], heights, style, color=COLOURS["student"], markersize=4, label=label)
            low, high = zip(*((p.score["low"], p.score["high"]) for p in line), strict=True)
            axis.fill_between([p.passes for p in line], low, high, color=COLOURS["student"], alpha=0.12, linewidth=0)
    axis.set(title=f"student: {RIGHT}", xlabel="step", ylim=(0, 1.02))
    axis.legend(loc="lower right", frameon=False)


def plot_quality(curves: Mapping[str, Sequence[Point]], data: float, path: Path) -> Path:
    """Scores against passes for a video: a line a network, each point named; the world's own videos as a level."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9, 5.4), layout="constrained")
    axis.axhline(data, color="0.5", linestyle=":", linewidth=2)
    axis.annotate("the world's own videos", (0.99, data), xycoords=("axes fraction", "data"), xytext=(0, -6),
                  textcoords="offset points", ha="right", va="top", fontsize=13, color="0.4")  # fmt: skip
    for (name, points), aside in zip(curves.items(), np.geomspace(1.025, 1 / 1.025, len(curves)), strict=True):
        colour = COLOURS.get(name)
        passes, heights = [p.passes * aside for p in points], [p.score["value"] for p in points]
        errors = np.transpose([p.error for p in points])
        axis.errorbar(passes, heights, yerr=errors, fmt="o-", color=colour, markersize=9, linewidth=2.5, capsize=4)
        below = name == "teacher"  # teachers are the lines on the right
        for point in points:
            where = (10, -10) if below else (-10, 10)
            axis.annotate(point.label, (point.passes, point.score["value"]), xytext=where, textcoords="offset points",
                          ha="left" if below else "right", va="top" if below else "bottom", fontsize=13,
                          color=colour)  # fmt: skip
    ticks = sorted({point.passes for points in curves.values() for point in points})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlim=(min(ticks) * 0.55, max(ticks) * 4), ylim=(0, 1.05))
    axis.set_xlabel("network passes for a video (a guided step takes two)", fontsize=15)
    axis.set_ylabel(RIGHT, fontsize=15)
    axis.tick_params(labelsize=13)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
