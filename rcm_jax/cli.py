"""What the commands share: how they read times, and how they end (one line for what a user can mend, code 143 for a run
that a signal stopped)."""

import contextlib
import os
import sys
from collections.abc import Iterator
from fractions import Fraction

USAGE_ERRORS = (ValueError, TypeError, OSError, RuntimeError)


def times(text: str, flag: str) -> tuple[float, ...]:
    """Numbers or fractions between commas or spaces; none in an empty text. Raises ValueError that names the flag."""
    try:
        return tuple(float(Fraction(word)) for word in text.replace(",", " ").split())
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--{flag} {text!r} must be numbers or fractions, like 15/16,5/6") from error


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """The library's errors become `error: …` and exit code 1; RCM_JAX_DEBUG=1 in the environment keeps the trace."""
    try:
        yield
    except USAGE_ERRORS as error:
        if os.environ.get("RCM_JAX_DEBUG"):
            raise
        sys.exit(f"error: {error}")
    except Exception as error:
        from rcm_jax.training.loop import Interrupted

        if not isinstance(error, Interrupted):
            raise
        print(error, file=sys.stderr)
        sys.exit(143)
