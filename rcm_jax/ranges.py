"""Which numbers are possible, said where an option or a setting is declared."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` (or above it, with `open`) to `high`; never NaN, and infinite only where `infinite`."""

    low: float
    high: float = math.inf
    open: bool = False
    infinite: bool = False

    def __contains__(self, value: float) -> bool:
        inside = (self.low < value if self.open else self.low <= value) and value <= self.high  # False for NaN
        return inside and (self.infinite or math.isfinite(value))

    def __str__(self) -> str:
        bounds = [f"{'above' if self.open else 'at least'} {self.low:g}"] * (self.low > -math.inf)
        if self.high < math.inf:
            bounds.append(f"at most {self.high if self.high % 1 else int(self.high)}")
        return " and ".join(bounds) if bounds else "a finite number"


def at_least(low: float) -> Range:
    return Range(low)


def between(low: float, high: float) -> Range:
    return Range(low, high)


POSITIVE = Range(0, open=True)
FINITE = Range(-math.inf)


def check_settings(settings: Any, prefix: str = "", **ranges: Range) -> None:
    """Raises ValueError that names the first setting of a config which is out of its range."""
    for name, allowed in ranges.items():
        if getattr(settings, name) not in allowed:
            raise ValueError(f"{prefix}{name}={getattr(settings, name)} must be {allowed}")
