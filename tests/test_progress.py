"""What is said while nothing moves, and when a run would be too long."""

import re
import time

import pytest

from rcm_jax.progress import Progress, in_words, waiting


def test_what_takes_long_is_said_once(capsys):
    with waiting("compiling", after=0.01):
        time.sleep(0.2)
    assert capsys.readouterr().err == "compiling …\n"
    with waiting("compiling", after=5):
        pass
    with waiting("", after=0):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_the_time_runs(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with waiting("compiling", after=0.01):
        time.sleep(3.5)
    said = capsys.readouterr().err
    assert len(set(re.findall(r"compiling … 00:0\d", said))) > 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0.4 seconds"), (1, "1 second"), (59, "59 seconds"), (90, "1.5 minutes"), (450_000, "125 hours")],
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


def test_a_run_over_its_limit_stops_as_soon_as_that_is_known(monkeypatch):
    """The first unit compiles and says nothing; the second shows how long the others take."""
    now = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with Progress("", 362, "step", limit=1800) as progress:
        progress.update()
        with pytest.raises(TimeoutError, match="after step 2 of 362 about 1 hour are left, more than 30 minutes"):
            progress.update()
    now = iter([100.0, 110.0])
    with Progress("", 361, "step", limit=3600) as progress:
        progress.update()
        progress.update()
