"""The version of the installed package."""

import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path


def version() -> str:
    """As pyproject.toml has it; "unknown" of files that were never installed."""
    try:
        return importlib.metadata.version("rcm_jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def code_version() -> str:
    """The version and a digest of the package's sources: equal where the same code runs."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    folders = os.walk(root, followlinks=True)  # some of the package's folders are links
    for file in sorted(Path(folder) / name for folder, _, names in folders for name in names if name.endswith(".py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return f"{version()}+{digest.hexdigest()[:12]}"
