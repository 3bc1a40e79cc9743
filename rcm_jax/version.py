"""The version of the installed package."""

import importlib.metadata


def version() -> str:
    """As pyproject.toml has it; "unknown" of files that were never installed."""
    try:
        return importlib.metadata.version("rcm_jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
