"""The package: what it says of itself, and what is in its two forms."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import rcm_jax
from rcm_jax import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_that_of_pyproject_everywhere():
    assert rcm_jax.__version__ == PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == PROJECT["version"]


@pytest.mark.parametrize(
    "module",
    [
        "train",
        "sample",
        "sample_causal",
        "evaluate",
        "demo",
        "convert.commands",
        "data.prepare.__main__",
        "kernels.bench",
        "kernels.tune",
        "chunks.__main__",
        "serve.__main__",
    ],
)
def test_every_command_tells_the_version(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"rcm_jax.{module}").main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"rcm_jax {PROJECT['version']}\n"


def test_files_that_were_never_installed_have_no_version(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SystemExit):
        cli.command_parser("sample", "").parse_args(["--version"])
    assert capsys.readouterr().out == "rcm_jax unknown\n"


def test_the_description_on_an_index_stands_alone():
    """It names nothing that only a checkout has: pictures, links to files, make, paths of recipes."""
    text = (ROOT / PROJECT["readme"]).read_text()
    targets = re.findall(r"\]\((.+?)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    assert not re.search(r"!\[|<img|\bmake\b|configs/|notebooks/|tests|pip install -e|\.venv", text)


def test_the_readmes_pictures_and_links_are_there():
    targets = re.findall(r"\]\((?!https?://)(.+?)\)", (ROOT / "README.md").read_text())
    assert {"docs/demo.png", "docs/quality.png"} <= set(targets)
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def dry_make(*words):
    """What make would run; the tests may themselves be run by make."""
    command = ["make", "-n", "--no-print-directory", *words]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment).stdout


def test_clean_leaves_what_users_made():
    told = dry_make("clean")
    assert told.split() == ["rm", "-rf", ".venv", "build", "*.egg-info"]


@pytest.mark.parametrize(("flags", "teacher"), [([], False), (["TEACHER=1"], True)])
def test_demo_causal_scores_the_teacher_where_it_is_asked_to(flags, teacher):
    told = dry_make("demo-causal", "PY=python", *flags)
    assert re.search(r"about .* on 2 cores", told, re.IGNORECASE)
    assert "--teacher_steps 50" in told
    assert ("--teacher ''" not in told) is teacher


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel) of the files that git tracks or would, and the names of the package's files among them."""
    folder = tmp_path_factory.mktemp("package")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "source" / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(folder / "source")]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    kinds = "py|npz|json|safetensors|txtpb|typed|html|css|js"
    package = {name for name in names if re.match(rf"rcm_jax/.*\.({kinds})$", name)}
    package |= {f"rcm_jax/{name}" for name in names if re.match(r"(kernels|convert|configs)/.*\.(py|json)$", name)}
    return next(folder.glob("dist/*.tar.gz")), next(folder.glob("dist/*.whl")), package


@pytest.mark.slow
def test_what_is_in_the_package(built):
    """The folders behind links are files of the package; the sdist has no tests, which need the repository."""
    sdist, wheel, package = built
    assert {"rcm_jax/kernels/tile_table.json", "rcm_jax/convert/dit.py", "rcm_jax/configs/toy_rcm.py"} < package
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert in_wheel == package
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not any(member.issym() or member.islnk() for member in members)
    in_sdist = {member.name.partition("/")[2] for member in members if member.isfile()}
    beside = {name for name in in_sdist - package if ".egg-info/" not in name}
    own = {"pyproject.toml", "docs/pypi.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in"}
    assert package <= in_sdist
    assert beside == own | {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_what_an_sdist_installs_makes_a_video(built, tmp_path):
    sdist, _, _ = built
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "lib"), str(sdist)]
    subprocess.run(install, check=True, timeout=600)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib"), "JAX_PLATFORMS": "cpu"}

    def python(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    paths = python(
        "-c", "import rcm_jax.kernels.attention as a, rcm_jax.configs.toy_rcm as c; print(a.__file__, c.__file__)"
    )
    assert all(Path(path).is_relative_to(tmp_path / "lib") for path in paths.split())
    out = python("-m", "rcm_jax.sample", "--num_steps", "2", "--prompt", "a red circle moving left")
    assert (tmp_path / out.strip()).stat().st_size > 0
