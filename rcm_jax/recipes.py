"""Recipes by their names, and the changes that a command line makes to them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rcm_jax

if TYPE_CHECKING:
    from ml_collections import ConfigDict

RECIPES = Path(rcm_jax.__file__).parent / "configs"


def recipes() -> list[str]:
    """Names of the package's recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "base")


def find_recipe(recipe: str) -> str:
    """The file of a recipe that is named, "toy_rcm" or "configs/toy_rcm.py", with its argument behind a colon; a file
    that is there comes first. Raises ValueError that lists the names."""
    path, colon, argument = recipe.partition(":")
    if not Path(path).is_file():
        name = Path(path).name.removesuffix(".py")
        if name not in recipes() or str(Path(path).parent) not in (".", "configs"):
            raise ValueError(f"no recipe at {path}; the package has {', '.join(recipes())}")
        path = str(RECIPES / f"{name}.py")
    return path + colon + argument


def read_config(recipe: str, changes: Sequence[str]) -> "ConfigDict":
    """The recipe, changed by words such as "--config.steps=9". Raises ValueError that names a word which is none."""
    from absl import flags
    from ml_collections import config_flags

    values, words = flags.FlagValues(), ["train", f"--config={find_recipe(recipe)}", *changes]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
    try:
        _, *others = values(words)
    except flags.UnrecognizedFlagError as error:
        raise ValueError(f"there is no flag --{error.flagname}; settings are --config.NAME=VALUE") from error
    except flags.Error as error:
        raise ValueError(str(error).removeprefix("flag ")) from error
    except (AttributeError, KeyError) as error:  # how ml_collections reports an unknown setting
        said = error.args[0]
        said = said.args[0] if isinstance(said, Exception) else said
        raise ValueError(f"the recipe has no such setting: {said}".replace("\n", ". ")) from error
    if others:
        raise ValueError(f"{others[0]!r} belongs to no flag; settings are --config.NAME=VALUE")
    return values.config
