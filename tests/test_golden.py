"""The golden checker passes on the goldens that come with the project, and fails where it should."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.golden import CASES
from tests.golden_common import load_case

GOLDENS = Path(__file__).parent / "goldens"
FILES = sorted(GOLDENS.glob("*.safetensors"))


def check(*paths):
    return subprocess.run(
        [sys.executable, "-m", "tests.golden", *map(str, paths)],
        capture_output=True, text=True, cwd=GOLDENS.parents[1], timeout=600,
    )  # fmt: skip


def test_every_kind_is_here_and_the_set_is_small():
    # dit_i2v holds all that dit_t2v does, kv_quant the bytes of sampler_causal_quant, and the cache policies' sampler
    # what kv_recache does, but for the recache itself, which tests/causal/test_ring.py follows frame by frame;
    # v2v_stream would take the set beyond its size
    left = {"dit_t2v", "sampler_causal_quant", "kv_recache", "v2v_stream"}
    assert {load_case(file).kind for file in FILES} == set(CASES) - left
    assert sum(file.stat().st_size for file in FILES) < 8e6


def changed(tmp_path, source, change_tensors=None, change_metadata=None):
    with safe_open(source, "numpy") as file:
        metadata = dict(file.metadata())
    tensors = load_file(source)
    (change_tensors or (lambda t: None))(tensors)
    (change_metadata or (lambda m: None))(metadata)
    path = tmp_path / source.name
    save_file(tensors, path, metadata)
    return path


def test_failures_are_failures(tmp_path):
    """A changed output, an unknown kind, an output nobody checks and a file that is none: each fails, each is named."""
    source = GOLDENS / "sampler_rcm_2step.safetensors"

    def off(tensors):
        tensors["outputs/final"] = tensors["outputs/final"] * np.float32(1 + 1e-5)

    def extra(tensors):
        tensors["outputs/extra"] = np.zeros(1, np.float32)

    folders = [tmp_path / n for n in "abc"]
    for folder in folders:
        folder.mkdir()
    wrong = changed(folders[0], source, off)
    unknown = changed(folders[1], source, None, lambda m: m.update(kind="sampler_new"))
    unchecked = changed(folders[2], source, extra)
    (tmp_path / "none.safetensors").write_bytes(b"nothing")
    result = check(source, wrong, unknown, unchecked, tmp_path / "none.safetensors")
    assert result.returncode == 1
    assert "1 passed, 4 failed" in result.stdout
    assert "sampler_new" in result.stdout
    assert "extra: no check covers this output" in result.stdout


def test_another_network_fails(tmp_path):
    source = GOLDENS / "dit_jvp_b.safetensors"

    def config(metadata):
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"num_heads": 4})

    assert check(changed(tmp_path, source, None, config)).returncode == 1


@pytest.mark.parametrize(
    "backend",
    [pytest.param("reference", marks=pytest.mark.slow), pytest.param("pallas_triton", marks=pytest.mark.slow)],
)
def test_the_network_through_every_backend(backend):
    """Its tangent, its causal masks and cache, and the tangent under a mask."""
    files = [*GOLDENS.glob("dit_jvp*.safetensors"), *GOLDENS.glob("dit_causal*.safetensors")]
    result = check("--attention", backend, *files)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", ["nowhere.safetensors"])
def test_a_missing_path_fails(path):
    assert check(path).returncode == 1
