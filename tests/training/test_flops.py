"""The formula against the products in the program of every kind of step, traced at full size, two layers deep."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

from rcm_jax.configs.base import run_config
from rcm_jax.kernels.masks import pairs
from rcm_jax.recipes import read_config
from rcm_jax.training import flops
from rcm_jax.training.abstract import abstract_batch, abstract_networks
from rcm_jax.training.lora import LoraConfig
from rcm_jax.training.state import abstract_state
from rcm_jax.training.step import make_steps
from rcm_jax.wan.config import WAN_1_3B

SIMULATED = 3
CLOSE = 1e-3  # time's embedding is not in the formula (2e-5), and texts that videos share may be embedded once (3e-4)


def products(jaxpr, trips, filled) -> float:
    """Operations of the matrix products in a program. Attention by its passes: the value, 2 products for its tangent a
    factor that moves, 4 for its gradient. `trips`: of loops whose trips the program does not know. `filled`: the keys
    of a cache that queries of that length see."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name, shapes = eqn.primitive.name, [getattr(x.aval, "shape", ()) for x in eqn.invars]
        if name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[0][d] for d in contracted)
        elif name.startswith("attention_") and name != "attention_second_derivative":
            (B, S, N, D), K = shapes[0], shapes[1][-3]
            arrays, mask = jax.tree.unflatten(eqn.params["tree"], [x.aval for x in eqn.invars])
            cached = mask is not None and not mask.query_ends  # a chunk's own keys are counted by themselves
            seen = S * (filled[S] - S) if cached else pairs(mask, S, K)
            moving = sum(x is not None for x in arrays[5:8])
            of_kernel = {"forward": 2, "forward_of_layer": 2, "tangent": {1: 2, 3: 4}.get(moving), "backward": 4}
            count = of_kernel[name.removeprefix("attention_")]
            total += 2 * B * N * D * seen * count
        else:
            times = eqn.params["length"] if name == "scan" else trips if name == "while" else 1
            total += times * sum(products(inner, trips, filled) for inner in _inside(eqn))
    return total


def _inside(eqn):
    """The programs that an equation runs: of a loop its body, of a choice all its branches."""
    given = [eqn.params["body_jaxpr"]] if eqn.primitive.name == "while" else eqn.params.values()
    for value in given:
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jax.extend.core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jax.extend.core.Jaxpr):
                yield item


def traced(config, kind, trips=1, filled=None) -> float:
    null = jnp.zeros((config.model.text_len, config.model.text_dim))
    step = make_steps(config, null)[kind]
    program = jax.make_jaxpr(step)(abstract_state(config), abstract_networks(config), abstract_batch(config)).jaxpr
    program, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    return products(program, trips, filled or {})


def shallow(recipe, model=(), causal=(), **method):
    config = run_config(read_config(recipe, ["--config.model.num_layers=2"]))
    own = dataclasses.replace(config.model, remat="none", **dict(model))
    score = config.score_model and dataclasses.replace(config.score_model, num_layers=2, remat="none")
    return dataclasses.replace(
        config, model=own, score_model=score, data=dataclasses.replace(config.data, batch_size=2), microbatches=1,
        method=dataclasses.replace(config.method, **method), causal=dataclasses.replace(config.causal, **dict(causal)),
    )  # fmt: skip


def filled(config) -> dict[int, float]:
    """Keys that a chunk of so many tokens sees of the cache, in the mean over the chunks of that size."""
    _, h, w = config.model.grid(config.data.latent_shape)
    seen: dict[int, list[int]] = {}
    for start, end in config.causal.spans(config.data.latent_shape[0]) if config.causal.pattern else ():
        seen.setdefault((end - start) * h * w, []).append(end * h * w)
    return {tokens: sum(ends) / len(ends) for tokens, ends in seen.items()}


LONG = pytest.mark.long
FLOW = {"name": "diffusion"}
SF, PLAIN, IMAGE = "wan_1_3b_causal_sf_dmd", {"causal": {"replay": False}}, {"in_channels": 36, "image_dim": 1280}


@pytest.mark.parametrize(
    ("recipe", "kind", "changes"),
    [
        ("wan_1_3b_rcm", "student_dmd", {}),
        ("wan_1_3b_causal_tf_scm:c3-3", "student", {}),
        pytest.param("wan_1_3b_rcm", "critic", {}, marks=LONG),
        pytest.param("wan_1_3b_causal_tf:c3-3", "diffusion", {}, marks=LONG),
        pytest.param("wan_1_3b_rcm", "student", {"consistency": "rf_scm"}, marks=LONG),
        pytest.param("wan_1_3b_rcm", "student", {"consistency": "dcm", "dcm_skip": 3}, marks=LONG),
        pytest.param("wan_1_3b_rcm", "student_dmd", {"model": IMAGE}, marks=LONG),
        pytest.param("wan_1_3b_rcm", "diffusion", {"name": "diffusion"}, marks=LONG),
        pytest.param("wan_1_3b_causal_df:c1-4", "diffusion", {}, marks=LONG),
        pytest.param("wan_1_3b_causal_tf_scm:c1-4", "student", {"causal": {"window": 3, "sink": 1}}, marks=LONG),
        pytest.param("wan_1_3b_causal_tf_dcm:c1-4", "student", {}, marks=LONG),
        pytest.param(f"{SF}:c3-3", "student_dmd", PLAIN, marks=LONG),  # replay computes the last steps again
        pytest.param(f"{SF}:c1-4,2step_noisy_ctx", "critic", {}, marks=LONG),
        pytest.param(f"{SF}_14b:c3-3", "student_dmd", PLAIN, marks=LONG),
        pytest.param(f"{SF}_14b:c3-3", "critic", {}, marks=LONG),
    ],
)
def test_a_step_has_the_products_of_the_formula(recipe, kind, changes):
    """A pass that was forgotten, or made twice, is a thirtieth of a step at the least."""
    config = shallow(recipe, **changes)
    simulated = 2 if "2step" in recipe else SIMULATED  # which all chunks have
    got = traced(config, kind, trips=simulated - 1, filled=filled(config))
    assert flops.kind_flops(config, kind, simulated) == pytest.approx(got, rel=CLOSE)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("student_dmd", {}), pytest.param("critic", {}, marks=LONG), pytest.param("diffusion", FLOW, marks=LONG)],
)
def test_a_lora_has_no_gradient_of_the_weights(kind, changes):
    """Counted are all products but its own, which are few."""
    config = shallow("wan_1_3b_rcm_lora", **changes)
    got, counted = traced(config, kind, trips=SIMULATED - 1), flops.kind_flops(config, kind, SIMULATED)
    assert 0.97 * got < counted < got
    assert counted < 0.97 * flops.kind_flops(dataclasses.replace(config, lora=LoraConfig()), kind, SIMULATED)


def test_a_run_counts_each_step_as_its_number_says():
    """Warm-up without distribution matching, then student and critic steps whose simulated steps go round."""
    config = shallow("wan_1_3b_rcm", tangent_warmup=2, student_update_freq=3)
    kinds = [("student", 1)] * 2 + [
        ("student_dmd", 3), ("critic", 1), ("critic", 2), ("student_dmd", 4), ("critic", 3), ("critic", 4),
        ("student_dmd", 1),
    ]  # fmt: skip
    for step, (kind, simulated) in enumerate(kinds):
        assert flops.step_flops(config, step) == flops.kind_flops(config, kind, simulated), step
    one = flops.forward(config.model, config.data.latent_shape).plain
    steps = {n: flops.kind_flops(config, "critic", n) for n in (1, 4)}
    assert steps[4] - steps[1] == 3 * one * config.data.batch_size
    assert steps[1] == pytest.approx(4 * one * config.data.batch_size, rel=1e-3)


def test_chunks_with_fewer_steps_of_their_own_take_no_more():
    four, two = (shallow(f"{SF}:c3-3,{preset}") for preset in ("4step", "2step"))
    assert flops.kind_flops(four, "critic", 2) == flops.kind_flops(two, "critic", 2)
    assert flops.kind_flops(four, "critic", 4) > flops.kind_flops(two, "critic", 4) > flops.kind_flops(two, "critic", 2)


def test_the_published_network():
    """Of the 1.3B at 480p: attention over 32,760 tokens is 4·30·32760²·1536, and more than half of all."""
    attention = 4 * 30 * 32760 * (32760 + 512) * 1536
    weights = 2 * 32760 * 30 * (6 * 1536**2 + 2 * 1536 * 8960)  # those that every token passes
    call = flops.forward(WAN_1_3B, (21, 60, 104))
    assert 1 < call.plain / (attention + weights) < 1.01
    assert attention > 0.5 * call.plain
    assert call.gradient == pytest.approx(2 * call.plain, rel=1e-3)


def test_peaks_by_the_names_that_devices_have():
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak("NVIDIA GeForce RTX 4090") == 165e12
    assert flops.peak("cpu") is None
