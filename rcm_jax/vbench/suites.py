"""VBench's dimensions and totals (arXiv 2311.17982): what is measured, on which scale, and how it adds up."""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A raw score in [0, 1] becomes (raw - low) / (high - low). suite: the dimension whose prompts it is measured on,
    where that is another."""

    name: str
    group: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    suite: str = ""

    def normalised(self, raw: float) -> float:
        return (raw - self.low) / (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class Suite:
    """dimensions: in the order of published tables. groups: the share of each in the total."""

    name: str
    title: str
    dimensions: tuple[Dimension, ...]
    groups: Mapping[str, float]

    def __getitem__(self, name: str) -> Dimension:
        return next(d for d in self.dimensions if d.name == name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.dimensions)

    def missing(self, raw: Mapping[str, float]) -> tuple[str, ...]:
        """Dimensions without a score."""
        return tuple(name for name in self.names if name not in raw)

    def scores(self, raw: Mapping[str, float], *, clamp: bool = False) -> dict[str, float]:
        """Fractions: normalised dimensions, the weighted mean of each group, and `total`, that of the groups.

        raw: fractions; what is missing is left out of its group, and a group without any is not there, nor a total then
        (`results.complete` refuses both first, unless it is told not to). clamp: normalised scores to [0, 1].
        """
        out = {d.name: d.normalised(raw[d.name]) for d in self.dimensions if d.name in raw}
        if clamp:
            out = {name: min(1.0, max(0.0, value)) for name, value in out.items()}
        means = {}
        for group in self.groups:
            there = [d for d in self.dimensions if d.group == group and d.name in out]
            if there:
                means[group] = math.fsum(d.weight * out[d.name] for d in there) / math.fsum(d.weight for d in there)
        if len(means) == len(self.groups):
            shares = math.fsum(self.groups.values())
            means["total"] = math.fsum(share * means[group] for group, share in self.groups.items()) / shares
        return out | means


_SUBJECT, _BACKGROUND = dict(low=0.1462), dict(low=0.2615)
_SMOOTH = dict(low=0.706, high=0.9975)

T2V = Suite(
    "t2v",
    "VBench, text to video",
    (
        Dimension("subject_consistency", "quality", **_SUBJECT),
        Dimension("background_consistency", "quality", **_BACKGROUND, suite="scene"),
        Dimension("temporal_flickering", "quality", low=0.6293),
        Dimension("motion_smoothness", "quality", **_SMOOTH, suite="subject_consistency"),
        Dimension("dynamic_degree", "quality", weight=0.5, suite="subject_consistency"),
        Dimension("aesthetic_quality", "quality", suite="overall_consistency"),
        Dimension("imaging_quality", "quality", suite="overall_consistency"),
        Dimension("object_class", "semantic"),
        Dimension("multiple_objects", "semantic"),
        Dimension("human_action", "semantic"),
        Dimension("color", "semantic"),
        Dimension("spatial_relationship", "semantic"),
        Dimension("scene", "semantic", high=0.8222),
        Dimension("appearance_style", "semantic", low=0.0009, high=0.2855),
        Dimension("temporal_style", "semantic", high=0.364),
        Dimension("overall_consistency", "semantic", high=0.364),
    ),
    {"quality": 4.0, "semantic": 1.0},
)

I2V = Suite(
    "i2v",
    "VBench, image to video",
    (
        Dimension("camera_motion", "i2v", weight=0.1),
        Dimension("i2v_subject", "i2v", **_SUBJECT),
        Dimension("i2v_background", "i2v", **_BACKGROUND),
        Dimension("subject_consistency", "quality", **_SUBJECT),
        Dimension("background_consistency", "quality", **_BACKGROUND),
        Dimension("motion_smoothness", "quality", **_SMOOTH),
        Dimension("dynamic_degree", "quality", weight=0.5),
        Dimension("aesthetic_quality", "quality"),
        Dimension("imaging_quality", "quality"),
    ),
    {"i2v": 1.0, "quality": 1.0},
)

SUITES = {suite.name: suite for suite in (T2V, I2V)}
