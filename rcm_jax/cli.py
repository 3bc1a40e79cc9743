"""How a command begins and ends: its parser, and one line for what a user can mend (code 143 for a run that a signal
stopped)."""

import argparse
import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from rcm_jax.compilation import keep_programs
from rcm_jax.errors import ArgumentError, Interrupted
from rcm_jax.ranges import Range
from rcm_jax.version import version
from rcm_jax.xla_flags import suit_cpus

USAGE_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError)


def number(kind: type, allowed: Range) -> Callable[[str], Any]:
    """An argparse type: a number in a range."""

    def parse(text: str) -> Any:
        value = kind(text)
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"{text} must be {allowed}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is none
    return parse


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line. Takes no abbreviated flags: a flag to come could take their name."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists what there is)\n")


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m rcm_jax.MODULE`."""
    parser = Parser(
        prog=f"python -m rcm_jax.{module}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"rcm_jax {version()}")
    return parser


@dataclasses.dataclass(frozen=True)
class Subcommands:
    """Of `python -m rcm_jax.MODULE`: each has its flags, what it does with what they say, and a line of help. What
    it gives is printed."""

    module: str
    description: str | None
    commands: Mapping[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[dict[str, Any]], str], str]]

    def parser(self, command: str | None = None) -> argparse.ArgumentParser:
        """Of one command, or of those that there are."""
        if command in self.commands:
            p = command_parser(f"{self.module} {command}", self.description)
            self.commands[command][0](p)
            return p
        p = command_parser(self.module, self.description)
        told = "; ".join(f"{name}: {words}" for name, (_, _, words) in self.commands.items())
        p.add_argument("command", choices=self.commands, help=told)
        return p

    def run(self, argv: Sequence[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else list(argv)
        command = argv[0] if argv and argv[0] in self.commands else None
        args = self.parser(command).parse_args(argv[command is not None :])
        with one_line_errors():
            print(self.commands[command][1](vars(args)))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a command's work: the library's errors become `error: …` and exit code 1 (RCM_JAX_DEBUG=1 in the
    environment keeps the trace), its warnings `warning: …`. Compiled programs are kept, XLA has what suits CPUs."""
    try:
        keep_programs()
        suit_cpus()
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
