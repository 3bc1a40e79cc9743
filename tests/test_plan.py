"""The planner: what it refuses, what it searches, and what it says of a recipe that fits and of one that does not."""

import dataclasses
import importlib.metadata
import json
import math

import jax
import pytest

from rcm_jax import plan, sample, sample_causal
from rcm_jax.aot import compile as offline
from rcm_jax.aot.gpus import find_gpu
from rcm_jax.aot.hlo import read
from rcm_jax.aot.report import Report
from rcm_jax.configs.base import run_config
from rcm_jax.recipes import read_config
from rcm_jax.training import planning
from tests.test_entry_points import fails, train

TOY = ["--config=toy_rcm", "--gpu", "h100"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config=toy_rcm", "--gpu", "h300"], ["gpu 'h300' is not known", "a100, b200, h100, h200, rtx_4090"]),
        ([*TOY, "--mesh", "fsdp=3", "--gpus", "8"], ["mesh.fsdp=3 does not divide the 8 devices", "[1, 2, 4, 8]"]),
        (
            [*TOY, "--mesh", "data=2", "fsdp=2", "--gpus", "8"],
            ["mesh.data=2 times mesh.fsdp=2", "devices, 8"],
        ),
        ([*TOY, "--mesh", "tensor=2"], ["--mesh tensor=2", "data, fsdp, sequence"]),
        ([*TOY, "--mesh", "fsdp=two"], ["--mesh fsdp=two: give AXIS=N"]),
        ([*TOY, "--step", "diffusion"], ["--step=diffusion is no step", "student, student_dmd, critic"]),
        ([*TOY, "--gpus", "7"], ["data.batch_size=", "divisible by the 7 devices"]),
        (["--config=nothing", "--gpu", "h100"], ["no recipe at nothing"]),
        ([*TOY, "--json", "plan.txt"], [".json"]),
    ],
)
def test_what_is_refused_before_anything_is_compiled(argv, words, monkeypatch):
    monkeypatch.setattr(planning, "compile_for", None)
    fails(plan.main, argv, *words)


def test_the_same_of_the_other_commands(tmp_path, monkeypatch):
    fails(train.main, ["--config=toy_rcm", "--gpu=h100"], "--gpu=h100 is a GPU to plan for, with --dry_run")
    for command in (sample, sample_causal):
        fails(command.main, ["--gpu", "h100"], "--dry_run and --gpu=h100 go together")
        fails(command.main, ["--dry_run"], "--dry_run and --gpu go together")
        fails(command.main, ["--dry_run", "--gpu", "h300"], "gpu 'h300' is not known")


@pytest.mark.parametrize("version", [None, "0.9.1"])
def test_without_the_plugin_of_this_jax_it_says_what_to_install(version, monkeypatch):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(offline.importlib.metadata, "version", installed)
    words = "pip install 'rcm_jax[aot]'" if version is None else f"pip install 'jax-cuda12-plugin=={jax.__version__}'"
    fails(plan.main, TOY, words)


def wan(*changes):
    return run_config(read_config("wan_14b_rcm", changes))


def test_the_search_tries_the_cheapest_first():
    tried = list(planning.candidates(wan(), 16))
    assert [c.model.remat for c in tried] == [remat for remat in planning.SEARCHED for _ in range(5)]
    meshes = [(c.mesh.sequence, c.mesh.fsdp, c.mesh.data) for c in tried]
    assert meshes == 3 * [(1, 8, 2), (1, 16, 1), (2, 8, 1), (4, 4, 1), (8, 2, 1)]
    for config in tried:
        mesh = config.mesh
        assert mesh.data * mesh.fsdp * mesh.sequence == 16
        assert config.data.batch_size == 64
        assert config.microbatches * 16 // mesh.sequence == 64  # a video at a time


def test_what_is_plain_is_not_compiled(monkeypatch):
    """The 14B's state alone takes more than eight GPUs have, whatever is kept."""
    monkeypatch.setattr(planning, "compile_for", None)
    alone = ["--config.mesh.sequence=1", "--config.mesh.fsdp=1"]
    config = dataclasses.replace(wan(*alone), microbatches=64)
    assert planning.at_least_bytes(config, 1) > 5 * 4 * 14e9
    plans = planning.search(wan("--config.model.num_layers=400", *alone), find_gpu("h100"), 8)
    assert not any(p.fits for p in plans)
    assert "not compiled" in planning.table(plans)
    assert "nothing fits" in planning.table(plans)


def test_the_bound_grows_with_what_is_kept():
    block, attention, dots, none = (
        planning.at_least_bytes(dataclasses.replace(wan(), model=dataclasses.replace(wan().model, remat=r)), 64)
        for r in ("block", "attention", "dots", "none")
    )
    input_of_all_layers = 40 * math.prod((21, 30, 52)) * 5120 * 2 // 8  # of the GPUs that share a video
    assert attention - block == input_of_all_layers
    assert none == dots > attention + 4 * input_of_all_layers


def made_up(name="student", peak=10):
    return Report(
        name=name, gpu="h100", devices=8, mesh={"fsdp": 8}, memory=100, arguments=4, outputs=0, temporaries=peak - 4,
        peak=peak, buffers=[], flops=1e15, once=[], collectives=[], kernels={"forward": 2}, compile_seconds=1.0,
    )  # fmt: skip


def test_exit_code_and_json(monkeypatch, tmp_path, capsys):
    """2 where it does not fit, with what would on the last line; 8% of the memory must stay free."""
    assert made_up(peak=92).fits
    assert not made_up(peak=93).fits
    config = run_config(read_config("toy_rcm", []))
    for peak, code in ((92, 0), (93, 2)):
        made = planning.Plan(config, 8, (made_up(peak=peak),))
        monkeypatch.setattr(planning, "plan", lambda *_, told, made=made, **__: told(made.reports[0]) or made)
        monkeypatch.setattr(planning, "what_fits", lambda *_: "--gpus 16 would")
        with pytest.raises(SystemExit) as stopped:
            plan.main([*TOY, "--json", str(tmp_path / "plan.json")])
        assert stopped.value.code == code
        out, err = capsys.readouterr()
        assert ("DOES NOT FIT" in out) == (code == 2)
        assert ("does not fit: --gpus 16 would" in err) == (code == 2)
        (written,) = json.loads((tmp_path / "plan.json").read_text())
        assert (written["fits"], written["steps"][0]["peak"]) == (code == 0, peak)


@pytest.mark.aot
@pytest.mark.slow  # each recipe's steps are compiled one by one in tests/aot
@pytest.mark.optimised
def test_a_toy_recipe_is_planned_and_searched(capsys):
    small = {"data.batch_size": 8, "model.unroll": 1, "model.num_layers": 1}
    config = run_config(read_config("toy_rcm", [f"--config.{name}={value}" for name, value in small.items()]))
    gpu = find_gpu("h100")
    told = []
    made = planning.plan(config, gpu, 8, told=told.append)
    assert [r.name for r in made.reports] == ["student", "student_dmd", "critic"] == [r.name for r in told]
    assert made.fits
    for r in made.reports:
        assert r.kernels
        assert r.peak == r.arguments + r.outputs + r.temporaries
        assert r.buffers[0].bytes >= r.buffers[-1].bytes
        assert r.text().startswith(f"{r.name} on 8 x h100")
    small = dataclasses.replace(gpu, memory=made.reports[0].peak // 2)
    assert not planning.plan(config, small, 8, step="student").fits
    found = planning.search(config, gpu, 8, step="critic")
    assert found[-1].fits
    assert "fits: --mesh" in planning.table(found)


@pytest.mark.aot
@pytest.mark.optimised
def test_sampling_is_planned_from_headers(capsys):
    for command in (sample, sample_causal):
        command.main(["--dry_run", "--gpu", "RTX-4090"])
        said = capsys.readouterr().out
        assert "on 1 x rtx_4090" in said
        assert "GiB a GPU: fits" in said


@pytest.mark.aot
def test_a_program_is_read_as_it_was_compiled():
    mesh = jax.make_mesh((1,), ("x",), devices=offline.absent("h100", 1))
    x = jax.ShapeDtypeStruct((256, 512), "bfloat16", sharding=jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        program = offline.compile_for(lambda x: x @ x.T, x)
    assert program.arguments == 256 * 512 * 2
    assert program.outputs == 256 * 256 * 2
    assert read(program.hlo).computations
    assert program.ptx
