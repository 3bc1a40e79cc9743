"""Weights go to disk a layer at a time, from wherever they lie."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rcm_jax import tensor_stream
from rcm_jax.model_file import ModelInfo, load_model, save_model
from rcm_jax.parallel import make_mesh, shard
from rcm_jax.tensor_stream import leaves, on_host
from tests.tiny import MODEL, perturbed_params

INFO = ModelInfo(MODEL, "student", "toy", (9, 6, 6))
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")

# what a process takes at its largest while it writes, beyond what it took before; numbers are made when they are read
CHILD = """
import sys
from pathlib import Path
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from rcm_jax.convert.checkpoint import MODELS
from rcm_jax.model_file import ModelInfo, save_model
from rcm_jax.parallel import make_mesh, shard
from rcm_jax.tensor_stream import leaves, write_safetensors
from rcm_jax.wan.config import WAN_14B, DiTConfig

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def ones(config):
    shapes = MODELS["t2v-14B"][0].shapes(config)
    return unflatten_dict({name: np.broadcast_to(np.float32(1), shape) for name, shape in shapes.items()}, sep="/")

what, out = sys.argv[1:]
config = WAN_14B if what == "14B" else DiTConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=12)
params = ones(config)
if what == "sharded":
    params = jax.block_until_ready(shard(params, make_mesh(1, 8, 1)))
size = sum(x.nbytes for x in jax.tree.leaves(params))
before = kilobytes("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
if what == "14B":
    write_safetensors(Path(out), leaves(params, "float32"), {}, lambda _: None)
else:
    save_model(out, params, ModelInfo(config, "student", "wan"), dtype="float16")
print("peak", 1024 * (kilobytes("VmHWM:") - before), size)
"""


def peak(what, out):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    told = subprocess.run(
        [sys.executable, "-c", CHILD, what, str(out)], capture_output=True, text=True, timeout=900, check=True, env=env
    )
    grown, size = map(int, told.stdout.split("peak")[1].split())
    print(f"\n{what}: {grown / 1e6:.0f} MB while {size / 1e9:.1f} GB are written")
    return grown, size


@pytest.mark.long
@needs_proc
@pytest.mark.parametrize("what", ["memory", "sharded"])
def test_memory_holds_a_layer(tmp_path, what):
    out = tmp_path / "x.safetensors"
    grown, size = peak(what, out)
    assert size > 800e6
    assert grown < (100e6 if what == "memory" else 300e6)
    assert size / 2 < out.stat().st_size < 1.01 * size / 2
    shutil.rmtree(tmp_path)  # pytest keeps its folders for a while


@needs_proc
@pytest.mark.slow
def test_fourteen_billion_within_two_gigabytes():
    """57 GB of them in float32, into nothing: the disk is not what is asked about."""
    grown, size = peak("14B", "/dev/null")
    assert size > 56e9
    assert grown < 2e9


def test_layers_come_from_any_mesh(monkeypatch):
    monkeypatch.setattr(tensor_stream, "WHOLE_BYTES", 1000)
    params = perturbed_params(MODEL)
    wanted = {
        name: np.concatenate([b.ravel() for b in leaf.blocks()]) for name, leaf in leaves(params, "float32").items()
    }
    for axes in [(1, 8, 1), (2, 2, 2)]:
        of_mesh = leaves(shard(params, make_mesh(*axes)), "float32")
        got = {name: [*leaf.blocks()] for name, leaf in of_mesh.items()}
        assert len(got["blocks/ffn_in/kernel"]) == MODEL.num_layers
        for name, blocks in got.items():
            np.testing.assert_array_equal(np.concatenate([*map(np.ravel, blocks)]), wanted[name], name)


def test_a_file_from_a_mesh_is_the_file_from_memory(tmp_path):
    params = perturbed_params(MODEL)
    one = save_model(tmp_path / "one.safetensors", params, INFO)
    mesh = save_model(tmp_path / "mesh.safetensors", shard(params, make_mesh(1, 8, 1)), INFO)
    assert one.read_bytes() == mesh.read_bytes()
    jax.tree.map(np.testing.assert_array_equal, load_model(mesh)[0], params)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    params = perturbed_params(MODEL)
    path = save_model(tmp_path / "m.safetensors", params, INFO)
    before = path.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**3}))
    with pytest.raises(OSError, match=r"cannot write .*m.safetensors: .* has 0.00 GB left, and m.safetensors takes"):
        save_model(path, params, INFO)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_what_is_no_jax_array_is_taken_as_it_is():
    array = np.arange(6.0).reshape(2, 3)
    assert on_host(array) is array
    np.testing.assert_array_equal(on_host(array, 1), array[1])


@pytest.mark.parametrize("layer", [None, 1])
def test_a_large_array_that_every_device_has_is_fetched_under_its_mesh(layer):
    """As a run's weights are while it trains, when they are left on the way."""
    array, mesh = np.arange(2 * 512 * 512, dtype=np.float32).reshape(2, 512, 512), make_mesh()
    with jax.set_mesh(mesh):
        fetched = on_host(jax.device_put(array, NamedSharding(mesh, P())), layer)
    np.testing.assert_array_equal(fetched, array if layer is None else array[layer])


# --- several processes ---

TOGETHER = """
import sys, os
import jax
from jax.experimental import multihost_utils
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from rcm_jax import tensor_stream
from rcm_jax.model_file import ModelInfo, save_model
from rcm_jax.parallel import make_mesh, state_shardings
from tests.tiny import MODEL, perturbed_params
from tests.test_tensor_stream import INFO

tensor_stream.WHOLE_BYTES = 1000
mesh = make_mesh(1, 8, 1)
params = jax.tree.map(np.asarray, perturbed_params(MODEL))
places = state_shardings(mesh, params)
params = jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), params, places)
save_model(sys.argv[3] + "/together.safetensors", params, INFO)
try:
    save_model(sys.argv[3] + "/file/x.safetensors", params, INFO)
except OSError as error:
    print("refused", error)

from pathlib import Path
from rcm_jax.pipelines.preview import open_previews
from rcm_jax.training.config import PreviewConfig
from tests.tiny import tiny_run

previews = open_previews(tiny_run(previews=PreviewConfig(num_steps=1)))
with jax.set_mesh(mesh):
    previews(1, params, INFO, Path(sys.argv[3]) / f"run{sys.argv[2]}")
"""


@pytest.mark.slow
def test_two_processes_write_one_file_and_one_preview(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    (tmp_path / "file").write_text("in the way")
    flags = "--xla_force_host_platform_device_count=4"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ".", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", TOGETHER, address]
    pipes = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([*command, str(i), str(tmp_path)], **pipes) for i in range(2)]
    told = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    alone = save_model(tmp_path / "alone.safetensors", perturbed_params(MODEL), INFO)
    assert (tmp_path / "together.safetensors").read_bytes() == alone.read_bytes()
    assert "Not a directory" in told[0][0] or "File exists" in told[0][0]
    assert "the first process says why" in told[1][0]
    assert (tmp_path / "run0" / "samples" / "0000001.mp4").stat().st_size > 0
    assert not (tmp_path / "run1").exists()
