"""Every step of every objective on meshes of eight devices: the numbers of one device, outputs that lie as the inputs
did, one compilation, and nothing that the partitioner warns of.

The optimiser's epsilon is so large that an update is the gradient, times a number that is one: with the usual one,
gradients that are zero but for rounding would be normalised to updates of full size. So what is compared is the
gradient, which float32 sums of another order change in its last digits.
"""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.objectives.config import CausalConfig, DiffusionConfig
from rcm_jax.objectives.networks import Networks
from rcm_jax.parallel import batch_sharding, make_mesh, shard, sharded_attention, state_shardings
from rcm_jax.training.lora import LoraConfig
from rcm_jax.training.state import init_state
from rcm_jax.training.step import make_steps
from tests.hosts import environment, finish, free_port
from tests.tiny import MODEL, RandomSource, perturbed_params, tiny_run

FOUR_HEADS = dataclasses.replace(MODEL, dim=32, num_heads=4)
I2V = dataclasses.replace(FOUR_HEADS, in_channels=MODEL.out_channels + 4, image_dim=6)
LATENTS = (3, 4, 4)  # frames of four tokens, three tokens on each of four devices
LINEAR = dict(eps=1e4, lr=1e4, lr_fake=1e4, weight_decay=0.0, warmup_updates=0)
MESHES = {
    "fsdp 8": dict(fsdp=8), "sequence 4": dict(data=2, sequence=4), "all three": dict(data=2, fsdp=2, sequence=2)
}  # fmt: skip
METHODS = {
    "rcm": dict(),
    "dmd": dict(method=dict(consistency="")),
    "dcm": dict(method=dict(consistency="dcm", dmd_scale=0.0)),
    "rf_scm": dict(method=dict(consistency="rf_scm", dmd_scale=0.0)),
    "diffusion": dict(method=dict(name="diffusion"), diffusion=DiffusionConfig(text_dropout=0.5, frame_times=0.5)),
    "tf": dict(method=dict(name="diffusion"), causal={}),
    "df": dict(method=dict(name="diffusion"), causal=dict(forcing="df")),
    "tf_scm": dict(method=dict(consistency="rf_scm", dmd_scale=0.0), causal={}),
    "tf_dcm": dict(method=dict(consistency="dcm", dmd_scale=0.0), causal=dict(noisy_context_from=1)),
    "lora": dict(lora=LoraConfig(rank=2, alpha=4.0, targets=("self_attn.*", "ffn.*"))),
    "sf_dmd": dict(method=dict(consistency="", max_simulation_steps=2), causal=dict(steps_per_chunk=(2, 1))),
    "i2v": dict(model=I2V),
    "i2v_low": dict(model=I2V, method=dict(t_range=(0.0, 0.9))),
    "i2v_diffusion": dict(model=I2V, method=dict(name="diffusion")),
}
STEPS = [
    ("rcm", "student"), ("rcm", "student_dmd"), ("rcm", "critic"), ("dmd", "student_dmd"), ("dcm", "student"),
    ("rf_scm", "student"), ("diffusion", "diffusion"), ("tf", "diffusion"), ("df", "diffusion"), ("tf_scm", "student"),
    ("tf_dcm", "student"), ("lora", "student_dmd"), ("lora", "critic"), ("sf_dmd", "student_dmd"), ("sf_dmd", "critic"),
    ("i2v", "student"), ("i2v_low", "student_dmd"), ("i2v_low", "critic"), ("i2v_diffusion", "diffusion"),
]  # fmt: skip
QUICK = {("diffusion", "diffusion", "all three", 2)}
LONG = {("tf_scm", "student", "sequence 4", 1), ("sf_dmd", "student_dmd", "all three", 1)}


def run_config(name, cuts):
    """Two videos, or four, on each of (data, fsdp): they divide each cut."""
    changes = METHODS[name] | {"causal": CausalConfig()}
    if "causal" in METHODS[name]:
        changes |= {"causal": CausalConfig(pattern="c1-2", **METHODS[name]["causal"]), "score_teacher": "given"}
    method = {"tangent_warmup": 0} | changes.pop("method", {})
    config = tiny_run(method=method, optimizer=LINEAR, microbatches=cuts, **{"model": FOUR_HEADS} | changes)
    data = dataclasses.replace(config.data, latent_shape=LATENTS, batch_size=8 * cuts)
    return dataclasses.replace(config, data=data)


def arguments(config):
    """The state before step 5, by which two steps are simulated; the networks, and two batches."""
    teacher, score = (perturbed_params(config.model, seed) for seed in (7, 2))
    state = init_state(config, teacher, score if config.score_teacher else None)
    if config.lora.rank:  # factors that are zero would hide errors
        state = state.replace(student=moved(state.student), fake_score=moved(state.fake_score))
    networks = Networks(teacher=teacher, score_teacher=score if config.score_teacher else None)
    source = RandomSource(config)
    null_text = np.random.default_rng(1).normal(size=source.null_text.shape).astype(np.float32)
    return state.replace(step=jnp.int32(5)), networks, [source.batch(i) for i in range(2)], null_text


def moved(factors):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape) / 8, x.dtype), factors)


@functools.cache
def alone(name, step, cuts):
    config = run_config(name, cuts)
    state, networks, (batch, _), null_text = arguments(config)
    before = jax.device_get(state)
    return before, jax.device_get(make_steps(config, null_text)[step](state, networks, batch))


def marks(case):
    return () if case in QUICK else pytest.mark.long if case in LONG else pytest.mark.slow


CASES = [
    pytest.param(*case, marks=marks(case), id=", ".join(map(str, case)))
    for cuts in (1, 2) for mesh in MESHES for case in [(*step, mesh, cuts) for step in STEPS]
]  # fmt: skip


@pytest.mark.parametrize(("name", "step", "mesh", "cuts"), CASES)
def test_a_mesh_gives_the_numbers_of_one_device(name, step, mesh, cuts, capfd):
    before, (want, want_metrics) = alone(name, step, cuts)
    mesh, config = make_mesh(**MESHES[mesh]), run_config(name, cuts)
    state, networks, batches, null_text = arguments(config)
    capfd.readouterr()
    with jax.set_mesh(mesh):
        run = make_steps(config, null_text, sharded_attention(mesh))[step]
        networks = shard(networks, mesh)
        first, second = (jax.device_put(batch, batch_sharding(mesh)) for batch in batches)
        after, metrics = run(shard(state, mesh), networks, first)
        got, shardings = jax.device_get(after), jax.tree.map(lambda x: x.sharding, after)
        run(after, networks, second)

    assert run._cache_size() == 1, "the second call compiled anew"
    assert "rematerialization" not in capfd.readouterr().err
    assert shardings == state_shardings(mesh, got)
    assert all(m.sharding.is_fully_replicated for m in metrics.values())
    assert_close(before, (want, want_metrics), (got, metrics))
    field = "fake_score" if step == "critic" else "student"
    changed = jax.tree.map(lambda a, b: np.any(a != b), getattr(before, field), getattr(want, field))
    assert all(jax.tree.leaves(changed)), "every leaf has a gradient"


def assert_close(before, want, got):
    """States and metrics after a step; `before` is the state before it."""
    (want, want_metrics), (got, metrics) = want, got
    for key, value in want_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, err_msg=key)
    assert got.step == 6

    def close(path, was, one, many):
        """To a ten-thousandth of the leaf's largest change, and the last digits of what is changed."""
        most = np.abs(one - was).max()
        np.testing.assert_allclose(many, one, rtol=3e-7, atol=1e-4 * most, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, before, want, got)


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [1, 2])
def test_two_hosts_give_the_numbers_of_one_device(tmp_path, cuts):
    """Every step on two processes of four devices each."""
    port, program = free_port(), [sys.executable, "-m", "tests.training.on_two_hosts", str(tmp_path), str(cuts)]
    with (tmp_path / "said").open("w") as out:
        processes = [
            subprocess.Popen([*program, f"127.0.0.1:{port}", str(i)], env=environment(4), stdout=out, stderr=out)
            for i in range(2)
        ]
        assert finish(processes, timeout=3000) == [0, 0], (tmp_path / "said").read_text()[-3000:]
    for name, step in STEPS:
        before, want = alone(name, step, cuts)
        got = np.load(tmp_path / f"{name}.{step}.npz")
        leaves = [got[str(i)] for i in range(len(jax.tree.leaves(want)))]
        assert_close(before, want, jax.tree.unflatten(jax.tree.structure(want), leaves))
