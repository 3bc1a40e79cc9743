"""Tables of flags in the documentation: `{{ options rcm_jax.pipelines.options.FileOptions }}` on a line of its own."""

import dataclasses
import importlib
import re
from typing import Any

LINE = re.compile(r"^\{\{ options ([\w.]+) \}\}$", re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return LINE.sub(lambda found: table(found[1]), markdown)


def table(name: str) -> str:
    """A row for every field that a command takes."""
    module, _, kind = name.rpartition(".")
    lines = ["| keyword, flag | default | |", "|---|---|---|"]
    for field in dataclasses.fields(getattr(importlib.import_module(module), kind)):
        if "help" in field.metadata:
            default = "" if field.default is dataclasses.MISSING or field.default in (None, False) else field.default
            lines.append(f"| `{field.name}` | {default} | {cell(field.metadata['help'])} |")
    return "\n".join(lines)


def cell(text: str) -> str:
    return text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")
