"""The launch examples: their linters accept them, and they name recipes and flags that there are."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
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


@pytest.mark.parametrize(("linter", "file"), [("shellcheck", "train.sbatch"), ("hadolint", "serve.Dockerfile")])
def test_its_linter_accepts(linter, file):
    program = shutil.which(linter, path=str(Path(sys.executable).parent)) or shutil.which(linter)
    if program is None:
        pytest.skip(f"needs {linter}: pip install -e '.[test]'")
    run = subprocess.run([program, DEPLOY / file], capture_output=True, text=True)
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


# --- the container ----------------------------------------------------------------------------------------------------


def instructions(name):
    """The arguments of each such instruction of the Dockerfile's last stage, or before any."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "serve.Dockerfile").read_text())
    *_, last = re.split(r"^FROM base$", text, flags=re.M)
    return re.findall(rf"^{name} (.*)", last, flags=re.M)


def test_the_container_runs_the_server():
    from rcm_jax.serve.__main__ import parser
    from rcm_jax.serve.app import OPEN
    from rcm_jax.serve.options import ServeOptions

    (entry,) = map(json.loads, instructions("ENTRYPOINT"))
    assert entry[:3] == ["python", "-m", "rcm_jax.serve"]
    given = vars(parser().parse_args(entry[3:]))
    limits = ServeOptions(**given)
    assert not limits.local  # others reach it, so that it asks for a token
    assert instructions("EXPOSE") == [str(limits.port)]
    (check,) = instructions("HEALTHCHECK")
    (path,) = re.findall(rf"http://127\.0\.0\.1:{limits.port}(/\w+)", check)
    assert path in OPEN  # without the token
    compile(json.loads(check.partition("CMD ")[2])[-1], "healthcheck", "exec")


def test_the_container_holds_no_secret_and_no_root():
    assert instructions("USER")[-1].isdigit()
    assert instructions("USER")[-1] != "0"
    assert not any("TOKEN" in line for name in ("ENV", "ARG", "RUN") for line in instructions(name))
    assert re.findall(r"RCM_JAX_CACHE=(\S+)", instructions("ENV")[0]) == instructions("VOLUME")


def test_the_container_is_built_of_what_there_is():
    root = DEPLOY.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (extras,) = (line.removeprefix("EXTRAS=").split(",") for line in instructions("ARG"))
    assert {"serve", "cuda"} <= set(extras) <= project["optional-dependencies"].keys()
    ignored = (DEPLOY / "serve.Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert all((root / name).exists() for name in kept)
    links = {link.readlink().name for link in (root / "rcm_jax").iterdir() if link.is_symlink()}
    assert {"pyproject.toml", "rcm_jax", project["readme"], *project["license-files"], *links} <= kept
