"""The launch examples: their linters accept them, and they name recipes and flags that there are."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rcm_jax.recipes import recipes
from tests.test_entry_points import train

DEPLOY = Path(__file__).parents[1] / "deploy"


def known() -> set[str]:
    return set(train.parser()._option_string_actions)


def jobset() -> dict:
    return yaml.safe_load((DEPLOY / "train.jobset.yaml").read_text())


def test_shellcheck_accepts_the_slurm_script():
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if program is None:
        pytest.skip("needs shellcheck: pip install -e '.[test]'")
    run = subprocess.run([program, DEPLOY / "train.sbatch"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_the_slurm_script_names_what_there_is():
    text = (DEPLOY / "train.sbatch").read_text()
    command = re.search(r'-m rcm_jax\.train ((?:.|\\\n)*?)"\$@"', text)[1]
    assert set(re.findall(r"--\w+", command)) <= known()
    assert re.search(r"deploy/train\.sbatch (\w+)", text)[1] in recipes()
    # one process a host, a signal in time to save, and what was saved goes on
    assert {"--ntasks-per-node=1", "--signal=TERM@300", "--requeue"} <= set(re.findall(r"#SBATCH (\S+)", text))


def test_the_jobset_names_what_there_is():
    job = jobset()
    (hosts,) = job["spec"]["replicatedJobs"]
    spec = hosts["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    given = dict(arg.split("=", 1) for arg in container["args"])
    assert container["command"][-1] == "rcm_jax.train"
    assert given.keys() <= known()
    assert given["--config"] in recipes()
    assert spec["completions"] == spec["parallelism"] == int(given["--num_hosts"])
    port = container["ports"][0]["containerPort"]
    name = job["metadata"]["name"]
    assert given["--coordinator"] == f"{name}-{hosts['name']}-0-0.{name}:{port}"


def test_the_jobset_starts_as_many_gpus_as_the_recipe_has():
    """As the SLURM script does for the recipe of its example."""
    from rcm_jax.configs.base import run_config
    from rcm_jax.recipes import read_config

    spec = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]
    gpus = spec["completions"] * int(
        spec["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    )  # fmt: skip
    text = (DEPLOY / "train.sbatch").read_text()
    nodes, each = (int(re.search(rf"#SBATCH --{name}=(\d+)", text)[1]) for name in ("nodes", "gpus-per-node"))
    mesh = run_config(read_config("wan_14b_rcm", [])).mesh
    assert gpus == nodes * each
    assert gpus % (mesh.fsdp * mesh.sequence) == 0
