"""When to stop a run that learns nothing: so many updates in a row left out, by the same rule on every host."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rcm_jax.objectives.objective import BAD
from rcm_jax.outputs import unfinished

REPORT = "stopped.json"


class StoppedLearningError(RuntimeError):
    """A run that left out as many updates in a row as its config allows."""


class Guard:
    """Counts updates that were left out, one after another. `limit` 0 never stops.

    keys: the samples of a step's batch, by what their data source calls them.
    """

    def __init__(self, limit: int, keys: Callable[[int], Sequence[str]]):
        self._limit, self._keys = limit, keys
        self._left_out: list[dict] = []

    def check(self, step: int, kind: str, metrics: dict[str, np.ndarray]) -> None:
        """Takes a step's metrics. Raises StoppedLearningError at the limit."""
        if not metrics["skipped_updates"]:
            self._left_out.clear()
            return
        self._left_out.append({"step": step, "kind": kind, **self._why(step, metrics)})
        if self._limit and len(self._left_out) >= self._limit:
            first, last = self._left_out[0]["step"], step
            reasons = dict.fromkeys(r for record in self._left_out for r in record["reasons"])
            raise StoppedLearningError(
                f"{len(self._left_out)} updates in a row were left out, steps {first} to {last}: {'; '.join(reasons)}"
            )

    def _why(self, step: int, metrics: dict[str, np.ndarray]) -> dict:
        reasons, samples = [], {}
        for name, bad in metrics.items():
            if name.startswith(BAD) and bad.any():
                loss = name.removeprefix(BAD)
                samples[loss] = [key for key, wrong in zip(self._keys(step), bad, strict=True) if wrong]
                if bad.all():
                    reasons.append(f"loss {loss} has no finite sample")
        for name, value in metrics.items():
            if name.startswith("loss_") and not np.isfinite(value):
                reasons.append(f"loss {name.removeprefix('loss_')} is {value:g}")
        if not np.isfinite(metrics["grad_norm"]):
            reasons.append(f"the gradient's norm is {metrics['grad_norm']:g}")
        if metrics["spikes"]:
            reasons.append("the gradient's norm is a spike")
        return {
            "reasons": reasons, "samples": samples,
            "metrics": {k: float(v) for k, v in metrics.items() if not k.startswith(BAD)},
        }  # fmt: skip

    def report(self, workdir: Path) -> Path:
        """Writes the steps in question: which loss, which samples, all their metrics."""
        with unfinished(workdir / REPORT) as new:
            new.write_text(json.dumps(self._left_out, indent=1))
        return workdir / REPORT
