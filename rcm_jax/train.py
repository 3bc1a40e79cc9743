"""Trains a recipe: python -m rcm_jax.train --config=configs/toy_rcm.py --workdir=runs/toy_rcm

Every setting of the recipe can be changed from here, e.g. --config.optimizer.lr=1e-4 --config.method.consistency=dcm
--config.seed=1. The workdir gets config.json, metrics.jsonl, tensorboard/, checkpoints/, samples/ (with
--config.sample_every=N) and, at the end, the averaged weights as student.safetensors (teacher.safetensors for method
"diffusion"). The same command again resumes from the newest checkpoint and gives the same numbers as a run that was
never stopped; SIGTERM saves and exits with code 143. --dry_run prints parameters and bytes per device and stops.
"""

import functools
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

import rcm_jax
from rcm_jax.cli import one_line_errors

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe: configs/NAME.py, the package's or your own.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; made if it is not there.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what the run would take, allocate nothing, write nothing.")
_DEVICES = flags.DEFINE_integer("devices", 0, "With --dry_run: the number of devices to plan for (0: those here).")


def find_recipe(argv: list[str]) -> list[str]:
    """Lets --config=configs/NAME.py name the package's recipe where there is no such file here."""
    out = []
    for arg in argv:
        name, equals, value = arg.partition("=")
        path = value.partition(":")[0]
        if name.lstrip("-") == "config" and equals and not Path(path).exists():
            packaged = Path(rcm_jax.__file__).parent / "configs" / Path(path).name
            if not packaged.exists():
                known = sorted(p.stem for p in packaged.parent.glob("*.py") if p.stem != "base")
                raise ValueError(f"no recipe at {path}, and the package has {known} in configs/")
            arg = f"{name}={packaged}{value[len(path) :]}"
        out.append(arg)
    return out


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one line where a setting is unknown, of the wrong type, or the recipe is not there."""
    try:
        return app.parse_flags_with_usage(find_recipe(argv))
    except (AttributeError, KeyError) as error:  # how ml_collections reports an unknown setting
        sys.exit("error: the recipe has no such setting: " + str(error).strip("'\"").replace("\\n", ". "))
    except ValueError as error:
        sys.exit(f"error: {error}")


def run(config) -> None:
    """What the command does, after its flags are read. Imports late, so that --help and flag errors are immediate."""
    from rcm_jax.configs.base import run_config
    from rcm_jax.outputs import check_folder
    from rcm_jax.pipelines.preview import write_preview
    from rcm_jax.training import runs

    config = run_config(config)
    if _DRY_RUN.value:
        print(runs.plan(config, _DEVICES.value))
        return
    if not _WORKDIR.value:
        raise ValueError("--workdir is missing: say where the run lives, e.g. --workdir=runs/mine")
    check_folder(_WORKDIR.value, "workdir")
    preview = functools.partial(write_preview, seed=config.seed)
    print(f"weights: {runs.train_recipe(config, _WORKDIR.value, on_samples=preview)}")


def main() -> None:
    """The command; installed as rcm-train."""
    from absl import logging

    logging.set_verbosity(logging.WARNING)  # absl would show what JAX says of the backends that are not there

    def guarded(_) -> None:
        with one_line_errors():
            run(_CONFIG.value)

    flags.mark_flag_as_required("config")
    app.run(guarded, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
