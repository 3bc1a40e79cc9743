"""Every recipe builds; the published ones carry the published numbers."""

import dataclasses
import importlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import rcm_jax
from rcm_jax.configs.base import run_config
from rcm_jax.objectives.config import DiffusionConfig
from rcm_jax.parallel import MESH_AXES, bytes_per_device, mesh_shape, spec, state_shardings
from rcm_jax.sampling.few_step import sampler_times
from rcm_jax.training.loop import check_batch
from rcm_jax.training.runs import plan
from rcm_jax.training.state import abstract_state
from rcm_jax.wan.config import WAN22_A14B_I2V, WAN_1_3B, WAN_14B, WAN_14B_I2V
from rcm_jax.wan.networks import abstract_network

NAMES = sorted(p.stem for p in (Path(rcm_jax.__file__).parent / "configs").glob("*.py") if p.stem != "base")


def recipe(name):
    return run_config(importlib.import_module(f"rcm_jax.configs.{name}").get_config())


@pytest.mark.parametrize("name", NAMES)
def test_recipe_builds_abstractly(name):
    """What the plan prints is what the state takes: the parameters, and GiB a device of each part."""
    config = recipe(name)
    text = plan(config, 64)
    rows = dict(re.findall(r"^  (\w[\w ]*?) +([\d.]+) GiB$", text, re.MULTILINE))
    state, shape = abstract_state(config), mesh_shape(-1, config.mesh.fsdp, config.mesh.sequence, 64)
    mesh = AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    parts = {"student": state.student, "ema": state.ema, "student optimiser": state.student_opt}
    parts |= {"fake score": state.fake_score, "fake optimiser": state.fake_opt} if config.method.uses_dmd else {}
    want = {key: bytes_per_device(mesh, tree) / 2**30 for key, tree in parts.items()}
    # of networks that stand still, those that a loss reads; Wan's in bfloat16, but for the few that stay float32
    score = "score teacher" if config.score_teacher else "teacher"
    _, teacher, scoring = config.models
    still = {"teacher": teacher} if config.method.uses_consistency else {}
    still |= {score: scoring} if config.method.uses_dmd else {}
    still |= {"teacher": teacher} if config.lora.rank else {}
    part = {"bfloat16": (0.5, 0.52), "float32": (1, 1)}[config.model.dtype]
    for key, network in still.items():
        full = bytes_per_device(mesh, abstract_network(network)) / 2**30
        assert part[0] * full - 6e-4 <= float(rows[key]) <= part[1] * full + 6e-4
        want[key] = float(rows[key])
    want["all"] = sum(want.values())
    assert rows.keys() == want.keys()
    assert {key: float(value) for key, value in rows.items()} == pytest.approx(want, abs=2e-3)
    whole, learned = (
        sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
        for tree in (abstract_network(config.model), state.student)
    )
    assert f"parameters of one network  {whole:,}" + f", of its LoRA {learned:,}" * (learned != whole) in text


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("wan_1_3b_rcm", dict(lr=2e-6, lr_fake=4e-7, mean=0.7, frequency=5, warmup=1000, sigma_max=80.0, frames=20)),
        ("wan_14b_rcm", dict(lr=1e-6, lr_fake=1e-7, mean=1.5, frequency=10, warmup=0, sigma_max=200.0, frames=21)),
    ],
)
def test_published_defaults(name, want):
    c = recipe(name)
    m, o = c.method, c.optimizer
    got = dict(
        lr=o.lr, lr_fake=o.lr_fake, mean=m.p_G.mean, frequency=m.student_update_freq, warmup=m.tangent_warmup,
        sigma_max=c.sigma_max, frames=c.data.latent_shape[0],
    )  # fmt: skip
    assert got == want
    assert (m.p_G.name, m.p_G.std, m.p_D.name, m.p_D.shift) == ("lognormal", 1.6, "uniform_shift", 5.0)
    assert (m.guidance, m.consistency, m.consistency_scale, m.dmd_scale) == (5.0, "scm", 100.0, 1.0)
    assert (o.b1, o.b2, o.eps, o.weight_decay, o.warmup_updates, o.clip_norm) == (0.0, 0.999, 1e-8, 0.01, 100, 0.0)
    assert (c.ema_rate, c.model.dtype, m.max_simulation_steps) == (0.1, "bfloat16", 4)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("tf", dict(lr=1e-5, betas=(0.9, 0.999), p_G=("uniform_shift", 5.0), sequence=1)),
        ("df", dict(lr=1e-5, betas=(0.9, 0.999), p_G=("uniform_shift", 5.0), sequence=1)),
        ("tf_dcm", dict(lr=2e-6, betas=(0.0, 0.999), dcm=("dcm", 48, 1, 3.0), guidance=3.0, sequence=4)),
        ("tf_scm", dict(lr=2e-6, betas=(0.0, 0.999), p_G=("lognormal", -0.8, 1.6), guidance=3.0, warmup=1000)),
        ("sf_dmd", dict(lr=2e-6, lr_fake=4e-7, betas=(0.0, 0.999), p_D=("uniform_shift", 5.0), frequency=6)),
    ],
)
def test_published_causal_defaults(name, want):
    c = recipe(f"wan_1_3b_causal_{name}")
    m, o = c.method, c.optimizer
    p_G = ("lognormal", m.p_G.mean, m.p_G.std) if m.p_G.name == "lognormal" else (m.p_G.name, m.p_G.shift)
    got = dict(
        lr=o.lr, lr_fake=o.lr_fake, betas=(o.b1, o.b2), p_G=p_G, p_D=(m.p_D.name, m.p_D.shift), guidance=m.guidance,
        dcm=(m.consistency, m.dcm_total_steps, m.dcm_skip, m.dcm_shift), warmup=m.tangent_warmup,
        frequency=m.student_update_freq, sequence=c.mesh.sequence,
    )  # fmt: skip
    assert {key: got[key] for key in want} == want
    assert (c.data.latent_shape, c.sigma_max, c.causal.score_guidance) == ((21, 60, 104), 1600.0, 5.0)


@pytest.mark.parametrize(
    ("name", "batch", "steps", "save", "shards", "sequence", "gpus"),
    [
        ("wan_1_3b_rcm", 256, 10_000, 500, 4, 1, 256),
        ("wan_14b_rcm", 64, 10_000, 250, 32, 8, 512),
        ("wan_1_3b_causal_tf", 256, 30_000, 1000, 4, 1, 256),
        ("wan_1_3b_causal_df", 256, 30_000, 1000, 4, 1, 256),
        ("wan_14b_causal_tf", 64, 30_000, 500, 32, 8, 512),
        ("wan_14b_causal_df", 64, 30_000, 500, 32, 8, 512),
        ("wan_1_3b_causal_tf_dcm_14b", 32, 10_000, 500, 32, 4, 128),
        ("wan_1_3b_causal_tf_scm_14b", 32, 1000, 500, 32, 4, 128),
        ("wan_1_3b_causal_sf_dmd_14b", 64, 1200, 50, 32, 4, 256),
    ],
)
def test_published_systems_settings(name, batch, steps, save, shards, sequence, gpus):
    """Of the published table; and a GPU, or a group that shares a video, has one at a time."""
    c = recipe(name)
    assert (c.data.batch_size, c.steps, c.checkpoint_every) == (batch, steps, save)
    assert (c.mesh.data, c.mesh.fsdp * c.mesh.sequence, c.mesh.sequence) == (-1, shards, sequence)
    assert c.data.batch_size * c.mesh.sequence == gpus, "of which each has one video without cuts"
    (devices,) = re.findall(r"--dry_run --devices=(\d+)", importlib.import_module(f"rcm_jax.configs.{name}").__doc__)
    count = int(devices)
    check_batch(c, count)
    assert c.data.batch_size // c.microbatches == count // c.mesh.sequence


def test_sizes_of_two_networks():
    for name in ("tf_scm", "tf_dcm"):
        c = recipe(f"wan_1_3b_causal_{name}_14b")
        assert c.models == (WAN_1_3B, WAN_14B, WAN_14B)
        assert c.init == "wan_1_3b_causal_tf/teacher.safetensors"
    assert recipe("wan_1_3b_causal_sf_dmd_14b").models == (WAN_1_3B, WAN_1_3B, WAN_14B)
    assert recipe("wan_14b_causal_df").models == (WAN_14B,) * 3


def test_image_to_video_recipes_are_the_published_one_on_pictures():
    """What differs from wan_14b_rcm: the network, Wan2.2's guidance, and each expert's side of the boundary."""
    t2v, i2v, high, low = map(recipe, ("wan_14b_rcm", "wan_14b_i2v_rcm", "wan22_i2v_high_rcm", "wan22_i2v_low_rcm"))
    assert (i2v.model, high.model, low.model) == (WAN_14B_I2V, WAN22_A14B_I2V, WAN22_A14B_I2V)
    assert len({c.teacher for c in (t2v, i2v, high, low)}) == 4
    for c in (i2v, high, low):
        method = dataclasses.replace(t2v.method, guidance=c.method.guidance, t_range=c.method.t_range,
                                     max_simulation_steps=c.method.max_simulation_steps)  # fmt: skip
        assert dataclasses.replace(t2v, model=c.model, teacher=c.teacher, method=method) == c
    assert (i2v.method.guidance, i2v.method.t_range, i2v.method.max_simulation_steps) == (5.0, (0.0, 1.0), 4)
    for c, side in ((high, (0.9, 1.0)), (low, (0.0, 0.9))):
        assert (c.method.guidance, c.method.t_range) == (3.5, side)
        assert c.method.max_simulation_steps == len(sampler_times(side)) == 2


def test_self_forcing_lasts_as_long_as_its_sampler_and_chunks_need():
    module = importlib.import_module("rcm_jax.configs.wan_1_3b_causal_sf_dmd")
    words = ("", "c3-3", "c1-1,2step", "c3-3,2step", "2step_noisy_ctx", "c3-3,2step_noisy_ctx", "1step", "c3-3,1step")
    assert [module.get_config(w).steps for w in words] == [1200, 1250, 3000, 2500, 1500, 1750, 3000, 3000]


def test_only_teachers_of_the_built_in_world_drop_text_and_raise_times():
    """Published networks come trained with an unconditional text, and are not made to forget the other."""
    set_there = {name: c for name in NAMES if (c := recipe(name).diffusion) != DiffusionConfig()}
    own = DiffusionConfig(text_dropout=0.1)
    assert {name for name in set_there if name.startswith("wan")} == set()
    assert set_there["toy_teacher_start"] == set_there["toy_causal_tf"] == own
    assert set_there["toy_teacher"] == dataclasses.replace(own, frame_times=0.6)


def test_causal_recipes_take_a_pattern_and_a_preset():
    module = importlib.import_module("rcm_jax.configs.wan_1_3b_causal_sf_dmd")
    c = run_config(module.get_config("c3-3,2step_noisy_ctx")).causal
    assert (c.pattern, c.steps_per_chunk, c.middle[1], c.noisy_context_from) == ("c3-3", (4, 2), (5 / 8,), 1)
    with pytest.raises(ValueError, match="argument 'c3-3,3step' must be a chunk pattern and one of"):
        module.get_config("c3-3,3step")


def test_every_large_parameter_is_sharded():
    """On 8 devices the state of the 1.3B takes an eighth, but for the small tables that are everywhere."""
    state = abstract_state(recipe("wan_1_3b_rcm"))
    mesh = AbstractMesh((1, 8), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    total = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert bytes_per_device(mesh, state) < total / 8 * 1.02
    for path, sharding in jax.tree_util.tree_leaves_with_path(state_shardings(mesh, state.student)):
        leaf = "/".join(k.key for k in path)
        if leaf.endswith("kernel"):
            assert "fsdp" in sharding.spec, leaf


def test_dimensions_that_do_not_divide_are_replicated():
    assert tuple(spec("x/q/kernel", (4, 24, 24), {"fsdp": 8, "data": 1})) == (None, "fsdp", None)
    assert tuple(spec("x/q/kernel", (4, 25, 24), {"fsdp": 8, "data": 1})) == (None, None, None)
    assert tuple(spec("x/q/bias", (24,), {"fsdp": 8, "data": 1})) == ()


def test_library_does_not_import_recipes_or_torch():
    """Only entry points may know configs/; nothing imports torch, triton or wandb with the library."""
    import subprocess
    import sys

    code = (
        "import sys, rcm_jax, rcm_jax.training.loop, rcm_jax.pipelines.preview;"
        "bad = [m for m in ('torch', 'triton', 'jax_triton', 'wandb', 'ml_collections', 'tensorboardX', 'matplotlib')"
        " if m in sys.modules]; bad += [m for m in sys.modules if m.startswith('rcm_jax.configs')]"
        ";"
        "sys.exit(', '.join(bad) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
