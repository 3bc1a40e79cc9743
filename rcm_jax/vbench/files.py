"""JSON that others wrote."""

import json
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> Any:
    """Raises OSError, and ValueError that names the file for what is no JSON, or has a name twice in one object, of
    which a reader would see the last alone."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}") from None


def told(value: Any) -> str:
    """The beginning of a value, for a message of one line."""
    return " ".join(str(value)[:60].split())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is twice in one object")
    return found
