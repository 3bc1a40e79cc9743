"""Options that have one name in Python and on the command line: fields of a dataclass, each declared once.

@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    num_steps: int | None = option(None, "network calls: 1 to 4 for a student")

add_options(parser, Options)                      # --num_steps
Options(**taken(vars(parser.parse_args()), Options))
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from typing import Any

from rcm_jax.errors import ArgumentError
from rcm_jax.ranges import FINITE, Range, at_least


def option(
    default: Any, help: str, *, also: Sequence[str] = (), only: Sequence[str] = (), range: Range = FINITE,
    **argparse_options: Any,
) -> Any:  # fmt: skip
    """A dataclass field that is also a flag. also: other names of the flag. only: the kinds of thing to which alone it
    applies (`refuse`). range: of a number, or of each in a sequence. argparse_options: what `add_argument` takes
    besides type and default."""
    metadata = {"help": help, "also": also, "only": only, "range": range, "argparse": argparse_options}
    return dataclasses.field(default=default, metadata=metadata)


def _type(hint: Any) -> Any:
    """The first type of a union that is not None: what one word on the command line becomes."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(kind for kind in kinds if kind is not type(None))


def add_options(parser: Any, options: type, *, names: Sequence[str] | None = None, without: Sequence[str] = ()) -> None:
    """A flag, in a parser or a group of one, for every field of the dataclass that `option` made; or for those named,
    or all but those that apply only to what the command is `without`. A flag that is not given leaves no attribute
    behind, so that defaults stand in the dataclass alone."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if "help" not in field.metadata or set(field.metadata["only"]) & set(without):
            continue
        if names is not None and field.name not in names:
            continue
        keywords: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": field.metadata["help"]}
        kind = _type(hints[field.name])
        if kind is bool:  # an option that may be switched off too is None unless it is given
            keywords["action"] = "store_true" if field.default is False else argparse.BooleanOptionalAction
        else:
            keywords["type"] = kind if isinstance(kind, type) else str
        keywords |= field.metadata["argparse"]
        parser.add_argument(*(f"--{name}" for name in (field.name, *field.metadata["also"])), **keywords)


def taken(given: dict[str, Any], options: type) -> dict[str, Any]:
    """Takes the values of the dataclass's fields out of what was parsed."""
    names = {field.name for field in dataclasses.fields(options)} & given.keys()
    return {name: given.pop(name) for name in names}


def check_options(options: Any) -> None:
    """Raises ArgumentError for a value that is not among its field's choices, or a number out of its range."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        choices = field.metadata.get("argparse", {}).get("choices")
        if choices and value is not None and value not in choices:
            raise ArgumentError(f"{{{field.name}}} must be one of {', '.join(choices)}", **{field.name: value})
        numbers = value if isinstance(value, (list, tuple)) else (value,)
        allowed = field.metadata.get("range", FINITE)
        if any(isinstance(x, Real) and x not in allowed for x in numbers):
            raise ArgumentError(f"{{{field.name}}} must be {allowed}", **{field.name: value})


def refuse(options: Any, kind: str, why: str) -> None:
    """Raises ArgumentError where an option is given that applies only to a `kind` of thing."""
    fields = [f for f in dataclasses.fields(options) if kind in f.metadata.get("only", ())]
    if wrong := dict.fromkeys(f.name for f in fields if getattr(options, f.name) != f.default):
        raise ArgumentError(f"{', '.join(f'{{{name}}}' for name in wrong)} does not apply: {why}", **wrong)


def times(value: str | Sequence[str | float], name: str) -> tuple[float, ...]:
    """Numbers or fractions: of a sequence, or of a text between commas or spaces; none in an empty one.

    Raises ArgumentError that names the argument."""
    text = value if isinstance(value, str) else " ".join(map(str, value))
    try:
        return tuple(float(Fraction(word)) for word in text.replace(",", " ").split())
    except (ValueError, ZeroDivisionError) as error:
        raise ArgumentError(f"{{{name}}} must be numbers or fractions, like 15/16,5/6", **{name: repr(text)}) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareOptions:
    """Which part of the work is this process's."""

    process: int = option(
        0, "number of this process, from 0: it makes parts I, I + N, I + 2N, …", metavar="I", range=at_least(0)
    )
    num_processes: int = option(
        1, "how many processes share the work, on any machines that see OUT", metavar="N", range=at_least(1)
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.process >= self.num_processes:
            raise ArgumentError(f"{{process}} must be 0 to {self.num_processes - 1}", process=self.process)
