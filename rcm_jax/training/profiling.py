"""A trace of some steps of a run, for XProf, TensorBoard's profiler or Perfetto: what the devices do, and when."""

import contextlib
import re
import warnings
from pathlib import Path

import jax

from rcm_jax.errors import ArgumentError
from rcm_jax.types import Metrics


def parse_steps(text: str, total: int) -> range:
    """ "10:13" are the steps 10, 11 and 12 of a run of `total`. Raises ArgumentError for anything else, and for steps
    that the run does not have."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    if not steps:
        raise ArgumentError(
            "{profile_steps} must be START:STOP, the first step to trace and the first that is not: 10:13 traces three",
            profile_steps=text,
        )
    if steps.stop > total:
        raise ArgumentError(f"{{profile_steps}} is beyond the run, which has steps={total}", profile_steps=text)
    return steps


class Profile:
    """Traces `steps` of a loop into `folder`: `before` and `after` each of its steps, and `close` at its end.

    A step that compiles is traced like any other: choose steps after the first of each kind. A run that resumes within
    the steps traces the rest of them. What goes wrong is a warning: no trace is worth a run.
    """

    def __init__(self, steps: range, folder: Path):
        self._steps, self._folder, self._tracing = steps, folder, False

    def before(self, step: int) -> None:
        if step in self._steps and not self._tracing:
            with self._without_ending_the_run():
                jax.profiler.start_trace(str(self._folder))
                self._tracing = True

    def after(self, step: int, metrics: Metrics) -> None:
        """`metrics`: what the step returned. Waits for the last of the steps, so that all of it is in the trace."""
        if self._tracing and step + 1 >= self._steps.stop:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._tracing:
            self._tracing, self._steps = False, range(0)
            with self._without_ending_the_run():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _without_ending_the_run(self):
        try:
            yield
        except Exception as error:
            self._steps = range(0)
            said = " ".join(str(error).split())[:200]
            warnings.warn(f"no trace in {self._folder} ({type(error).__name__}: {said})", stacklevel=4)
