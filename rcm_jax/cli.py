"""How a command begins and ends: its parser, and one line for what a user can mend (code 143 for a run that a signal
stopped)."""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator

from rcm_jax.errors import ArgumentError, Interrupted

USAGE_ERRORS = (ValueError, TypeError, OSError, RuntimeError)


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m rcm_jax.MODULE`."""
    return argparse.ArgumentParser(
        prog=f"python -m rcm_jax.{module}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """The library's errors become `error: …` and exit code 1, its warnings `warning: …`; RCM_JAX_DEBUG=1 in the
    environment keeps the trace."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line_warning
            yield
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(143)
    except USAGE_ERRORS as error:
        if os.environ.get("RCM_JAX_DEBUG"):
            raise
        sys.exit(f"error: {error.as_flags() if isinstance(error, ArgumentError) else error}")


def _one_line_warning(message: Warning | str, *_: object) -> None:
    print("warning:", " ".join(str(message).split()), file=sys.stderr)
