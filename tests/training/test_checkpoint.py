"""What a checkpoint is worth after anything that can happen to files: whole, or said to be damaged; never wrong."""

import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rcm_jax.checksums import checksums
from rcm_jax.parallel import make_mesh
from rcm_jax.training.checkpoint import Checkpoints, DamagedError, abstract_like
from rcm_jax.training.state import NormRecord, TrainState

MESHES = {
    "1": dict(devices=1),
    "2": dict(devices=2, fsdp=2),
    "4, sequence": dict(devices=4, sequence=4),
    "8, fsdp": dict(devices=8, fsdp=8),
    "8, all": dict(devices=8, fsdp=2, sequence=2),
}


def mesh_of(name="8, fsdp"):
    sizes = dict(MESHES[name])
    return make_mesh(devices=jax.devices()[: sizes.pop("devices")], **sizes)


def state_on(mesh, seed=0):
    rng = np.random.default_rng(seed)

    def put(shape, dtype=np.float32, spec=()):
        return jax.device_put(rng.normal(size=shape).astype(dtype), NamedSharding(mesh, PartitionSpec(*spec)))

    params = {
        "a": {"kernel": put((16, 24), spec=("fsdp",))},
        "b": {"scale": put((3,)), "half": put((4, 8), jnp.bfloat16)},
    }
    whole = NamedSharding(mesh, PartitionSpec())
    norms = jax.device_put(NormRecord.empty(), whole)
    step, seed = (jax.device_put(jnp.asarray(n, jnp.int32), whole) for n in (seed, 7))
    return TrainState(step, seed, params, jax.tree.map(jnp.array, params), {"nu": put((16, 24))}, norms)


def like(state):
    return abstract_like(state, jax.tree.map(lambda x: x.sharding, state))


def opened(workdir, mesh=None, **options):
    return Checkpoints(workdir, mesh or mesh_of(), keep=3, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 1 and 2, and what they hold."""
    workdir, mesh = tmp_path_factory.mktemp("run"), mesh_of()
    states = {step: state_on(mesh, step) for step in (1, 2)}
    checkpoints = opened(workdir)
    for step, state in states.items():
        checkpoints.save(step, state, {"code": "this"})
    checkpoints.wait()
    checkpoints.close()
    return workdir, states


@pytest.fixture
def workdir(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_checksums_do_not_depend_on_the_mesh_and_see_every_bit():
    sums = [checksums(state_on(mesh_of(name)), mesh_of(name)) for name in MESHES]
    assert all(s == sums[0] for s in sums)
    state, mesh = state_on(mesh_of()), mesh_of()
    kernel = np.array(state.student["a"]["kernel"])
    for bit in (0, 22, 31):
        bits = kernel.view(np.uint32).copy()
        bits[5, 7] ^= np.uint32(1 << bit)
        changed = state.replace(student=state.student | {"a": {"kernel": jnp.asarray(bits.view(np.float32))}})
        differ = {k for k, v in checksums(changed, mesh).items() if sums[0][k] != v}
        assert differ == {"student/a/kernel"}, bit
    swapped = kernel.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    changed = state.replace(student=state.student | {"a": {"kernel": jnp.asarray(swapped)}})
    assert checksums(changed, mesh)["student/a/kernel"] != sums[0]["student/a/kernel"], "order counts"


@pytest.mark.parametrize("name", MESHES)
def test_a_state_comes_back_on_another_mesh(saved, name):
    workdir, states = saved
    mesh = mesh_of(name)
    restored, about = opened(workdir, mesh).restore(2, like(state_on(mesh)))
    assert_equal(restored, states[2])
    assert about["step"] == 2
    assert about["code"] == "this"
    assert restored.student["a"]["kernel"].sharding.mesh == mesh


def files_of(checkpoint):
    return sorted((f for f in checkpoint.rglob("*") if f.is_file()), key=lambda f: (f.stat().st_mtime_ns, str(f)))


def restored_or_damaged(workdir, step, states):
    """The state's numbers as they were saved, or DamagedError: nothing else."""
    checkpoints = opened(workdir)
    said = ""
    try:
        state, _ = checkpoints.restore(step, like(states[step]))
    except DamagedError as error:
        said = str(error)
    finally:
        checkpoints.close()
    if not said:
        assert_equal(state, states[step])
        return ""
    assert "\n" not in said
    assert f"checkpoints/{step}" in said
    assert len(said) < 600
    return said


def test_flipped_bits_are_seen(workdir, saved):
    """One bit in the middle of each file, one file after the other, and at more places of the largest."""
    errors = []
    files = files_of(workdir / "checkpoints" / "2")
    largest = max(files, key=lambda file: file.stat().st_size)
    for file in files:
        good = file.read_bytes()
        for part in range(1, 12, 2) if file == largest else (6,):
            bad = bytearray(good)
            bad[len(bad) * part // 12] ^= 4
            file.write_bytes(bad)
            errors.append(restored_or_damaged(workdir, 2, saved[1]))
        file.write_bytes(good)
    assert any("arrays are not as they were saved" in error for error in errors), "TensorStore misses some"
    assert not restored_or_damaged(workdir, 2, saved[1]), "put back, it is whole"


def test_truncated_files_are_seen(workdir, saved):
    errors = []
    for file in files_of(workdir / "checkpoints" / "2"):
        good = file.read_bytes()
        file.write_bytes(good[: len(good) // 2])
        errors.append(restored_or_damaged(workdir, 2, saved[1]))
        file.write_bytes(good)
    assert any(errors)


def test_an_older_one_is_found_and_the_damaged_one_moved(workdir, saved):
    for file in files_of(workdir / "checkpoints" / "2" / "state"):
        file.write_bytes(file.read_bytes()[:10])
    checkpoints = opened(workdir)
    assert checkpoints.latest() == 2
    assert checkpoints.whole_before(2, like(saved[1][1])) == 1
    assert checkpoints.whole_before(1, like(saved[1][1])) is None
    assert [p.name for p in checkpoints.set_aside(after=1)] == ["2"]
    assert checkpoints.latest() == 1
    assert (workdir / "set_aside" / "2").is_dir()
    checkpoints.save(2, saved[1][2], {"code": "this"})
    checkpoints.wait()
    assert_equal(checkpoints.restore(2, like(saved[1][2]))[0], saved[1][2])
    checkpoints.close()


TEMPORARY = "2.orbax-checkpoint-tmp"


def test_a_save_that_was_killed_at_any_file_leaves_the_one_before_it(workdir, saved):
    """What a kill leaves behind: the first k files of a checkpoint under its temporary name, the last of them half."""
    checkpoint = workdir / "checkpoints" / "2"
    names = [(f.relative_to(checkpoint), f.read_bytes()) for f in files_of(checkpoint)]
    shutil.rmtree(checkpoint)
    assert len(names) > 5
    for count in range(len(names) + 1):
        rest = checkpoint.with_name(TEMPORARY)
        rest.mkdir()
        for i, (name, data) in enumerate(names[:count]):
            (rest / name).parent.mkdir(parents=True, exist_ok=True)
            (rest / name).write_bytes(data[: len(data) // 2] if i == count - 1 else data)
        checkpoints = opened(workdir)
        assert checkpoints.steps() == [1], f"{count} files"
        assert not rest.exists(), "it is cleared away"
        assert_equal(checkpoints.restore(1, like(saved[1][1]))[0], saved[1][1])
        checkpoints.close()


def test_files_that_are_missing_are_seen(workdir, saved):
    """As a copy that was stopped leaves a checkpoint under its own name."""
    errors = []
    for file in files_of(workdir / "checkpoints" / "2"):
        good = file.read_bytes()
        file.unlink()
        errors.append(restored_or_damaged(workdir, 2, saved[1]))
        file.write_bytes(good)
    assert any(errors)


def test_what_is_kept(tmp_path):
    mesh = mesh_of("1")
    checkpoints = Checkpoints(tmp_path, mesh, keep=2, keep_every=4)
    for step in range(1, 10):
        checkpoints.save(step, state_on(mesh), {"code": ""})
    checkpoints.wait()
    assert checkpoints.steps() == [4, 8, 9]
    checkpoints.close()


FULL = """
    import os, resource, sys
    sys.path.insert(0, {here!r})
    from tests.training.test_checkpoint import *

    workdir, mesh = Path({workdir!r}), mesh_of("1")
    checkpoints = opened(workdir, mesh)
    assert checkpoints.steps() == [1, 2]
    state = state_on(mesh, 3).replace(student={{"a": jax.random.normal(jax.random.key(0), (1 << 20,))}})
    {trouble}
    try:
        checkpoints.save(3, state, {{"code": ""}})
        checkpoints.wait()
    except OSError as error:
        print("said:", error)
"""


TROUBLES = {
    "no room for the file": "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))",
    "no folder": "shutil.rmtree(workdir / 'checkpoints'); (workdir / 'checkpoints').touch()",
    # root may write where nobody may: it becomes another user
    "read-only": "(workdir / 'checkpoints').chmod(0o555); os.geteuid() or os.seteuid(65534)",
}
WORDS = {"no room for the file": "File too large", "no folder": "is a file", "read-only": "Permission denied"}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.long
def test_a_save_that_fails_is_said(saved, trouble):
    """In the background, where that is where it fails."""
    workdir = Path(tempfile.mkdtemp(prefix="rcm_jax_")) / "run"  # pytest's folders are closed to other users
    workdir.parent.chmod(0o755)
    shutil.copytree(saved[0], workdir)
    workdir.chmod(0o755)
    here = str(Path(__file__).parents[2])
    program = textwrap.dedent(FULL).format(here=here, workdir=str(workdir), trouble=TROUBLES[trouble])
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
        line = next(line for line in done.stdout.splitlines() if line.startswith("said:"))
        assert f"cannot write a checkpoint in {workdir}/checkpoints" in line
        assert WORDS[trouble] in line
        if trouble != "no folder":
            assert "step 2 is the newest that is whole" in line
            (workdir / "checkpoints").chmod(0o755)
            assert not restored_or_damaged(workdir, 2, saved[1])
    finally:
        shutil.rmtree(workdir.parent)
