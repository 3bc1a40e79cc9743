"""Errors about arguments, which have one name in Python and on the command line."""

import re
from collections.abc import Callable
from typing import Any


class ArgumentError(ValueError):
    """A wrong argument. The message names it as the caller does: a keyword in Python, a flag on the command line.

    {name} in `message` stands for the argument of that name among `arguments`: with its value, or the name alone where
    that is None or True. So `ArgumentError("{num_samples} must be at least 1", num_samples=0)` reads
    "num_samples=0 must be at least 1", and "--num_samples=0 must be at least 1" in a command. What else is between
    braces stays as it is.
    """

    def __init__(self, message: str, **arguments: Any):
        self.message, self.arguments = message, arguments
        super().__init__(self.told(lambda name: name))

    def renamed(self, names: dict[str, str]) -> "ArgumentError":
        """For a caller whose arguments have other names: theirs by those here."""
        message = self.message
        for own, theirs in names.items():
            message = message.replace(f"{{{own}}}", f"{{{theirs}}}")
        return ArgumentError(message, **{names.get(name, name): value for name, value in self.arguments.items()})

    def as_flags(self) -> str:
        """The message in terms of flags."""
        return self.told(lambda name: f"--{name}")

    def told(self, spelled: Callable[[str], str]) -> str:
        def name(match: re.Match) -> str:
            value = self.arguments[match[1]]
            return spelled(match[1]) + ("" if value is None or value is True else f"={value}")

        known = "|".join(map(re.escape, self.arguments))
        return re.sub(rf"\{{({known})\}}", name, self.message) if known else self.message


class MissingFileError(ArgumentError, FileNotFoundError):
    """A file that is not where it was looked for; the message says which argument names it."""


class Interrupted(Exception):
    """A signal asked a run to stop; its state was saved before step `step`."""

    def __init__(self, step: int, workdir: Any):
        self.step = step
        super().__init__(f"stopped by a signal; saved before step {step} in {workdir}; the same command resumes there")
