"""Converting a file takes far less memory than the file, whatever goes in and whatever comes out."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rcm_jax.convert.networks import MODELS
from rcm_jax.convert.table import lazy_to_theirs
from rcm_jax.convert.tensors import Tensor
from rcm_jax.wan.config import DiTConfig

# all layers' weights of one name, which Orbax writes as one, are a tenth of the file at most
CONFIG = DiTConfig(dim=1024, ffn_dim=1024, num_heads=8, num_layers=33)

# what the process takes at its largest, beyond what it takes when it begins
CHILD = """
import sys
from pathlib import Path
from rcm_jax.convert import checkpoint, commands, export, output

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

before = kilobytes("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
commands.main(sys.argv[1:])
print("peak", kilobytes("VmHWM:") - before)
"""


def hollow_file(path, config) -> int:
    """A safetensors file in Wan2.1's names and in bfloat16, all zeros, which takes no room on the disk."""
    network = MODELS["t2v-14B"][0]
    flat = {name: Tensor(shape, None, None) for name, shape in network.shapes(config).items()}
    wan = lazy_to_theirs(network.table.rows(config), flat, config.num_layers, network.table.layouts(config))
    return hollow(path, wan)


def hollow(path, tensors) -> int:
    """All zeros, in bfloat16, by the names and shapes of these; takes no room on the disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def peak(*argv, code: str = CHILD) -> int:
    """Bytes above what the imports take."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, timeout=600, check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "."},
    )  # fmt: skip
    return 1024 * int(result.stdout.split("peak")[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("words", "out"),
    [
        pytest.param([], ["out.safetensors", "--dtype", "float32"], marks=pytest.mark.long),
        pytest.param([], ["out", "--format", "orbax"], marks=pytest.mark.slow),
        pytest.param(["export"], ["out.pt"], marks=pytest.mark.slow),
    ],
)
def test_memory_stays_far_below_the_file(tmp_path, words, out):
    source = tmp_path / "hollow.safetensors"
    size = hollow_file(source, CONFIG)
    assert size > 600e6
    assert peak(*words, source, tmp_path / out[0], *out[1:]) < 0.3 * size
    written = tmp_path / out[0]
    assert written.exists()
    shutil.rmtree(written) if written.is_dir() else written.unlink()  # pytest keeps its folders for a while


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_of_one_large_tensor_no_more_is_held_than_of_many(tmp_path):
    """umT5's embedding is 4 GB of its file: what is mapped of it goes back to the system piece by piece."""
    tensor = {"embedding": Tensor((1_200_000, 256), np.dtype(np.float32), lambda: np.zeros(1))}
    source, out = tmp_path / "hollow.safetensors", tmp_path / "out.safetensors"
    size = hollow(source, tensor)
    assert size > 600e6
    code = CHILD.replace("commands.main(sys.argv[1:])", COPY)
    assert peak(source, out, code=code) < 0.45 * size
    out.unlink()


COPY = """
from rcm_jax.convert.safetensors_io import read_safetensors
from rcm_jax.tensor_stream import write_safetensors
tensors, _ = read_safetensors(Path(sys.argv[1]))
write_safetensors(Path(sys.argv[2]), {n: t.astype("float32") for n, t in tensors.items()}, {}, lambda _: None)
"""
