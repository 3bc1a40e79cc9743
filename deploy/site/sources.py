"""Where the reference reads docstrings: a copy of the package in which the rooms behind links are folders. A reader of
sources takes a folder for a package by its __init__.py, which these have not: beside the package they must be none."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

PACKAGE = Path(__file__).parents[2] / "rcm_jax"


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> Any:
    copy = Path(tempfile.mkdtemp(prefix="rcm_jax_docs_")) / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for link in PACKAGE.iterdir():
        if link.is_symlink():
            (copy / link.name / "__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(copy.parent)]
    config.extra["sources"] = copy.parent
    return config


def on_post_build(config: Any) -> None:
    shutil.rmtree(config.extra["sources"])
