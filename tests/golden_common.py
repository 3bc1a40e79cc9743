"""What every golden check shares: reading a case, comparing one tensor, and insisting that no tensor is left out.

A golden file is one case: `inputs/`, `weights/` and the `outputs/` that the public PyTorch code gives for them. A
checker, one for each kind of case, rebuilds the computation from the case's config and returns a `Check` for each
output; `run_case` runs it and fails the case when an output has none. `python -m tests.golden` does so for folders.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden file. Tensor names have lost their first part: `inputs/noise` is `inputs["noise"]`."""

    path: Path
    kind: str
    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def load_case(path: str | Path) -> Case:
    """Reads a golden file. Raises ValueError for a tensor name outside weights/, inputs/ and outputs/."""
    groups: dict[str, dict[str, np.ndarray]] = {"weights": {}, "inputs": {}, "outputs": {}}
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118, not a dict: it only has keys()
            group, _, rest = name.partition("/")
            if group not in groups or not rest:
                raise ValueError(f"{path}: tensor {name!r} must be named {'/…, '.join(groups)}/…")
            groups[group][rest] = file.get_tensor(name)
    return Case(path=Path(path), kind=metadata["kind"], config=json.loads(metadata["config"]), **groups)


def channels_last(x: np.ndarray) -> np.ndarray:
    """Golden [..., C, F, H, W] -> library [..., T, H, W, C]."""
    return np.moveaxis(x, -4, -1)


def channels_first(x: np.ndarray) -> np.ndarray:
    """Library [..., T, H, W, C] -> golden [..., C, F, H, W]."""
    return np.moveaxis(np.asarray(x), -1, -4)


@dataclasses.dataclass(frozen=True)
class Check:
    """`got` against the output `want` of that name. Every limit given has to hold; at least one must be given.

    rel: limit of ||got - want|| / ||want||, L2 norms in float64.
    max_abs: limit of max |got - want|; an array gives every element (it broadcasts over `want`) a limit of its own.
    exact: the values must be equal.
    """

    name: str
    got: Any
    want: np.ndarray
    rel: float | None = None
    max_abs: float | np.ndarray | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.rel is None and self.max_abs is None and not self.exact:
            raise ValueError(f"check {self.name!r} has no limit: give rel=, max_abs= or exact=True")

    @property
    def shapes_match(self) -> bool:
        return np.shape(self.got) == np.shape(self.want)

    def _difference(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # inf - inf, which is NaN and fails
            return np.asarray(self.got, np.float64) - np.asarray(self.want, np.float64)

    def rel_error(self) -> float:
        """||got - want|| / ||want||; 0 for two zeros, inf for wrong shapes, NaN where a NaN or two infinities meet."""
        if not self.shapes_match:
            return float("inf")
        error, norm = np.linalg.norm(self._difference()), np.linalg.norm(np.asarray(self.want, np.float64))
        return float(error / norm) if norm > 0 else float(error and np.inf)

    def abs_error(self) -> float:
        """max |got - want|; inf for wrong shapes, NaN as in `rel_error`."""
        return float(np.max(np.abs(self._difference()), initial=0.0)) if self.shapes_match else float("inf")

    def share(self) -> float:
        """How much of its tolerance the check uses: the largest error/limit. It holds up to 1; NaN does not hold."""
        if not self.shapes_match:
            return float("inf")
        shares = [0.0]
        if self.exact:
            shares.append(0.0 if np.array_equal(np.asarray(self.got), self.want) else float("inf"))
        if self.rel is not None:
            shares.append(_ratio(np.array(self.rel_error()), self.rel))
        if self.max_abs is not None:
            shares.append(_ratio(np.abs(self._difference()), self.max_abs))
        return float(np.max(shares))  # np.max, unlike max, keeps a NaN

    @property
    def ok(self) -> bool:
        return self.share() <= 1


def _ratio(error: np.ndarray, limit: float | np.ndarray) -> float:
    """The largest error/limit, where no error at all satisfies even a limit of 0."""
    limit = np.broadcast_to(np.asarray(limit, np.float64), error.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(error == 0, 0.0, error / limit), initial=0.0))


Checker = Callable[[Case], list[Check]]


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one case. `missing`: outputs that no check covers, each of which fails the case."""

    case: Case
    checks: list[Check]
    missing: list[str]

    @property
    def ok(self) -> bool:
        return not self.missing and all(check.ok for check in self.checks)

    def worst(self) -> Check:
        """The check that uses most of its tolerance; a NaN is worse than anything."""
        return max(self.checks, key=lambda check: (np.isnan(check.share()), check.share()))

    def __str__(self) -> str:
        lines = [f"{'pass' if self.ok else 'FAIL'}  {self.case.path.name}"]
        for c in self.checks:
            errors = f"rel {c.rel_error():.1e}  max {c.abs_error():.1e}"
            lines.append(f"  {'ok  ' if c.ok else 'FAIL'}  {c.name:32s}  {errors}  {c.share():.1%} of the tolerance")
        return "\n".join(lines + [f"  FAIL  {name}: no check covers this output" for name in self.missing])


def run_case(case: Case, checkers: Mapping[str, Checker]) -> Report:
    """Checks one case with the checker of its kind.

    Raises ValueError for a kind without a checker, for a checker that returns nothing, and for a check of an output
    that the file does not have (a misspelt name would otherwise pass for a covered one).
    """
    if case.kind not in checkers:
        raise ValueError(f"{case.path}: kind {case.kind!r} must be one of {sorted(checkers)}")
    checks = checkers[case.kind](case)
    unknown = sorted({check.name for check in checks} - set(case.outputs))
    if unknown or not checks:
        raise ValueError(f"{case.path}: the checker compares {unknown}; the outputs are {sorted(case.outputs)}")
    return Report(case, checks, missing=sorted(set(case.outputs) - {check.name for check in checks}))
