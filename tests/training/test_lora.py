"""LoRA in a run: what learns, what stands still, and what is left."""

import dataclasses
import functools
import importlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from rcm_jax.configs.base import run_config
from rcm_jax.convert.commands import main as convert
from rcm_jax.model_file import ModelInfo, load_model, save_model
from rcm_jax.objectives.networks import Networks
from rcm_jax.parallel import make_mesh
from rcm_jax.pipelines.pipeline import load
from rcm_jax.recipes import read_config
from rcm_jax.training.abstract import abstract_networks
from rcm_jax.training.config import RunConfig
from rcm_jax.training.lora import LoraConfig, init_lora, layers_of, with_base
from rcm_jax.training.runs import train_recipe
from rcm_jax.training.state import Weights, abstract_state, bases, init_state
from rcm_jax.training.step import make_steps
from rcm_jax.wan import layers
from rcm_jax.wan.config import WAN_14B_I2V
from rcm_jax.wan.dit import DiT
from tests.test_entry_points import fails
from tests.tiny import MODEL, RandomSource, perturbed_params, tiny_run

train_command = importlib.import_module("rcm_jax.train")  # `from rcm_jax import train` is the loop's function
# an update is minus the gradient, but for the last digits: see test_mesh
LINEAR = dict(eps=1e8, lr=1e8, lr_fake=1e8, weight_decay=0.0, warmup_updates=0)
WIDE = 32  # at least the width of every layer's input: `down` can pass all of it


@pytest.fixture(scope="module")
def teacher():
    return perturbed_params(MODEL, 7)


def lora_run(rank=3, **changes) -> RunConfig:
    given = {"lora": LoraConfig(rank=rank), "method": {"tangent_warmup": 0}} | changes
    return tiny_run(**given)


# --- the network ---


def inputs():
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 4, 12))
    return x, jnp.array([250.0, 900.0]), jax.random.normal(jax.random.key(2), (2, 5, MODEL.text_dim))


def random_factors(lora, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), init_lora(lora, MODEL, jax.random.key(0))
    )


def summed(base, factors, lora):
    """The network with the products added to its kernels."""
    flat, learned = flatten_dict(base), flatten_dict(factors)
    for path in {name[:-1] for name in learned}:
        product = learned[(*path, "lora_down")] @ learned[(*path, "lora_up")]
        flat[(*path, "kernel")] = flat[(*path, "kernel")] + lora.strength / lora.rank * product
    return unflatten_dict(flat)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_network_with_its_lora_is_the_network_of_the_sum_and_so_is_its_tangent(teacher, remat):
    lora = LoraConfig(rank=3, alpha=6.0, targets=("*.*",))
    factors, (x, t, text) = random_factors(lora), inputs()

    def both(params):
        def v(x, t):
            return DiT(dataclasses.replace(MODEL, remat=remat)).apply({"params": params}, x, t, text)

        return jax.jvp(v, (x, t), (jnp.cos(x), jnp.ones_like(t)))

    whole = with_base(teacher, factors, lora)
    for got, want in zip(jax.jit(both)(whole), jax.jit(both)(summed(teacher, factors, lora)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_without_a_lora_the_program_is_that_of_plain_layers(teacher, monkeypatch):
    def program():
        lowered = jax.jit(DiT(MODEL).apply).lower({"params": teacher}, *inputs())
        return lowered.as_text(debug_info=False)

    with_ours = program()
    plain = functools.partial(nn.Dense, dot_general=layers.gathered_product)
    monkeypatch.setattr(layers, "Dense", plain)
    monkeypatch.setattr("rcm_jax.wan.dit.Dense", plain)
    assert program() == with_ours


# --- the gradient ---


def one_step(config, name, teacher, state=None):
    source = RandomSource(config)
    before = init_state(config, teacher) if state is None else state
    kept = jax.device_get(before)
    after, metrics = make_steps(config, source.null_text)[name](before, Networks(teacher=teacher), source.batch(0))
    return kept, jax.device_get(after), metrics


@pytest.mark.parametrize(
    ("step", "field"),
    [
        pytest.param("student_dmd", "student", marks=pytest.mark.slow),
        pytest.param("critic", "fake_score", marks=pytest.mark.long),
    ],
)
def test_full_rank_learns_in_the_direction_of_the_full_gradient(teacher, step, field):
    """With up zero, d(up) is downᵀ dW and d(down) is zero. So where downs have orthonormal rows, as wide as the layer's
    input, down · d(up) is dW, and a rank less wide sees its projection. The losses are those of the whole network."""
    full = lora_run(rank=0, optimizer=LINEAR)
    before, after, want_metrics = one_step(full, step, teacher)
    gradient = flatten_dict(jax.tree.map(np.subtract, getattr(before, field), getattr(after, field)), sep="/")

    config = lora_run(rank=WIDE, optimizer=LINEAR)
    state, rng = init_state(config, None), np.random.default_rng(0)

    def orthonormal(path, x):
        if path[-1].key != "lora_down":
            return x
        rows = [np.linalg.qr(rng.normal(size=x.shape[:0:-1]))[0].T for _ in range(x.shape[0])]
        return jnp.asarray(np.stack(rows), jnp.float32)

    factors = jax.tree_util.tree_map_with_path(orthonormal, getattr(state, field))
    kept, after, metrics = one_step(config, step, teacher, state.replace(**{field: factors}))
    for name, value in want_metrics.items():
        if name.startswith("loss_"):
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    change = flatten_dict(jax.tree.map(np.subtract, getattr(kept, field), getattr(after, field)), sep="/")
    downs = flatten_dict(getattr(kept, field), sep="/")
    assert len(change) == 2 * len(layers_of(config.lora, MODEL))
    for name in (name for name in change if name.endswith("lora_up")):
        down, want = downs[name.replace("_up", "_down")], gradient[name.replace("lora_up", "kernel")]
        np.testing.assert_allclose(
            down @ down.swapaxes(1, 2), np.broadcast_to(np.eye(down.shape[1]), (2, *down.shape[1:2] * 2)), atol=1e-5
        )
        np.testing.assert_allclose(
            change[name], down.swapaxes(1, 2) @ want, rtol=1e-3, atol=2e-4 * np.abs(want).max(), err_msg=name
        )
        np.testing.assert_allclose(down @ change[name], want, rtol=1e-3, atol=2e-4 * np.abs(want).max(), err_msg=name)
        assert not change[name.replace("_up", "_down")].any()


# --- a run ---


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def files(tmp_path_factory, teacher):
    """A teacher's file, and a run of four steps from it with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("lora")
    file = save_model(folder / "teacher.safetensors", teacher, ModelInfo(MODEL, "teacher", "toy", (9, 6, 6)))
    settings = {"tangent_warmup": 0, "consistency": "dcm", "dmd_scale": 0.0}  # one kind of step to compile
    config = lora_run(teacher=str(file), method=settings, steps=4, checkpoint_every=2, sigma_max=123.0, weights_every=2)
    seen = []
    left = train_recipe(
        dataclasses.replace(config, sample_every=4), folder / "run", progress="",
        open_samples=lambda _: lambda step, params, info, workdir: seen.append(jax.device_get(params)),
    )  # fmt: skip
    return folder, config, left, seen[0]


def test_a_run_leaves_a_lora_whose_sum_with_the_teacher_is_its_student(files, teacher):
    folder, config, left, previewed = files
    assert left.name == "student_lora.safetensors"
    assert (folder / "run" / "weights" / "0000002" / "student_lora.safetensors").is_file()
    convert(["merge", config.teacher, str(folder / "student.safetensors"), "--lora", str(left)])
    merged, info = load_model(folder / "student.safetensors")
    assert (info.kind, info.sigma_max, info.world, info.latent_shape) == ("student", 123.0, "toy", (9, 6, 6))
    factors = {n: x for n, x in flatten_dict(previewed).items() if n[-1].startswith("lora_")}
    rest = {n: x for n, x in flatten_dict(previewed).items() if n not in factors}
    assert_same(unflatten_dict(rest), teacher)
    want = summed(teacher, unflatten_dict(factors), config.lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), merged, want)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), merged, teacher)))
    pipe = load(folder / "student.safetensors")
    assert pipe.info.kind == "student"
    assert pipe("a red circle moving left", num_steps=1)[0].frames.ndim == 4


def test_checkpoints_hold_the_factors_alone(files):
    folder, config, left, _ = files
    about = json.loads((folder / "run" / "checkpoints" / "4" / "about" / "metadata").read_text())
    named = [name.split("/")[-1] for name in about["checksums"] if "/" in name]
    assert {name for name in named if name not in ("count", "log_mean")} == {"lora_down", "lora_up"}
    numbers = sum(x.size for x in jax.tree.leaves(init_lora(config.lora, MODEL, jax.random.key(0))))
    assert 4 * numbers < left.stat().st_size < 4 * numbers + 10_000  # names, shapes, checksums


@pytest.mark.parametrize(("recipe", "megabytes"), [("wan_1_3b_rcm_lora", 875), ("wan_14b_finetune_lora", 2454)])
def test_checkpoints_take_megabytes(recipe, megabytes):
    """Of the 1.3B, rank 32: student, average, fake score, two second moments; of the 14B a first moment too. Whole
    networks would take 28 GB and 229 GB."""
    config = run_config(read_config(recipe, []))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state(config)))
    assert size == pytest.approx(megabytes * 1e6, rel=0.01)


def test_a_checkpoint_gives_its_lora(files, tmp_path):
    folder, _, left, _ = files
    step = folder / "run" / "checkpoints" / "4"
    for form in ("comfyui", "kohya", "diffusers"):
        convert(["lora", str(step), str(tmp_path / f"{form}.safetensors"), "--form", form])
        convert(
            [
                "merge",
                str(folder / "teacher.safetensors"),
                str(tmp_path / f"{form}-sum.safetensors"),
                "--lora",
                str(tmp_path / f"{form}.safetensors"),
            ]
        )
    assert (tmp_path / "diffusers.safetensors").read_bytes() == left.read_bytes()
    sums = [load_model(tmp_path / f"{form}-sum.safetensors") for form in ("comfyui", "kohya", "diffusers")]
    for params, info in sums[1:]:
        assert_same(params, sums[0][0])
        assert info == sums[0][1]
    fails(
        convert,
        ["checkpoint", str(step), str(tmp_path / "x.safetensors")],
        "a run that learns a LoRA",
        "rcm-convert lora",
    )


@pytest.mark.long
def test_a_resumed_run_is_the_run(files, tmp_path):
    _, config, left, _ = files
    for steps in (2, 4):
        again = train_recipe(dataclasses.replace(config, steps=steps), tmp_path, progress="")
    assert again.read_bytes() == left.read_bytes()


def test_the_base_is_the_teacher_and_the_state_has_factors_alone(teacher):
    networks = Weights(teacher=teacher).networks(lora_run(), make_mesh(devices=jax.devices()[:1]))
    assert [name for name in ("teacher", "init", "score_teacher") if getattr(networks, name) is not None] == ["teacher"]
    state = abstract_state(lora_run())
    names = {path[-1] for tree in (state.student, state.ema, state.fake_score) for path in flatten_dict(tree)}
    assert names == {"lora_down", "lora_up"}


def test_what_a_lora_is_added_to():
    """The teacher, once, where all start from it; else what the run would start from without a LoRA."""

    def stand(**changes):
        config = lora_run(**changes)
        networks = abstract_networks(config)
        there = [name for name in ("teacher", "init", "score_teacher") if getattr(networks, name) is not None]
        named = {id(getattr(networks, name)): name for name in there}
        return there, *(named[id(base)] for base in bases(config, networks))

    diffusion = {"name": "diffusion"}
    assert stand() == (["teacher"], "teacher", "teacher")
    assert stand(init="given") == (["teacher", "init"], "init", "init")
    assert stand(score_teacher="given") == (["teacher", "score_teacher"], "teacher", "score_teacher")
    assert stand(method=diffusion) == (["teacher"], "teacher", "teacher")
    assert stand(method=diffusion, teacher="", init="given") == (["init"], "init", "init")


# --- settings ---


def test_targets_are_names_and_patterns():
    def chosen(*targets, model=MODEL):
        return [path.removeprefix("blocks/") for path in layers_of(LoraConfig(rank=1, targets=targets), model)]

    assert len(layers_of(LoraConfig(rank=1), MODEL)) == 10
    assert len(layers_of(LoraConfig(rank=1), WAN_14B_I2V)) == 12, "and keys and values of the image"
    assert chosen("ffn.0") == ["ffn_in"]
    assert chosen("*_attn.[qv]") == ["self_attn/q", "self_attn/v", "cross_attn/q", "cross_attn/v"]
    assert chosen("cross_attn.*_img", model=WAN_14B_I2V) == ["cross_attn/k_img", "cross_attn/v_img"]
    assert chosen("time_projection.1", "head.head") == ["time_projection", "head/out"]
    config = lora_run(optimizer={"frozen": ("time_in", "head")}, lora=LoraConfig(rank=1, targets="head.head,ffn.0"))
    assert config.frozen == ("head",)
    assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.lora.targets=('self_attn.*','ffn.1')"], ["no 'ffn.1'", "ffn.0, ffn.2", "head.head"]),
        (["--config.lora.targets=()"], ["lora.targets is empty", "self_attn.q"]),
        (["--config.teacher=", "--config.method.name=diffusion"], ["lora.rank=8 needs weights", "teacher is empty"]),
        (["--config.lora.alpha=-1"], ["lora.alpha=-1.0 must be at least 0"]),
    ],
)
def test_what_is_refused_before_anything_is_compiled(tmp_path, flags, words, monkeypatch):
    monkeypatch.setattr("rcm_jax.training.runs.train_recipe", None)
    fails(train_command.main, ["--config=toy_rcm", f"--workdir={tmp_path}/run", "--config.lora.rank=8", *flags], *words)
    assert not (tmp_path / "run").exists()
