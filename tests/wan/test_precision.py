"""What stays float32 in a network of lower dtype, at the lowest default that a user can set.

A CPU multiplies in full whatever it is told; on GPUs a default may mean TF32. So the programs are read, not run.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rcm_jax.wan.clip import CLIP, preprocess
from rcm_jax.wan.dit import DiT
from rcm_jax.wan.umt5 import UMT5
from rcm_jax.wan.vae import VAE
from tests.wan import test_clip, test_dit, test_umt5, test_vae

EXACT = {jax.lax.Precision.HIGHEST}


def low(config):
    return dataclasses.replace(config, dtype="bfloat16")


def velocity(params, x, t, text):
    return DiT(low(test_dit.I2V)).apply({"params": params}, x, t, text, test_dit.IMAGE)


def one_pass(params, x, t, text):
    """The parameters' gradient of a loss that holds a jvp, as in training."""

    def loss(params):
        v, tangent = jax.jvp(lambda x, t: velocity(params, x, t, text), (x, t), (x, t))
        return (v * jax.lax.stop_gradient(tangent)).sum()

    return jax.grad(loss)(params)


def clip_tokens(params, image):
    return CLIP(low(test_clip.SMALL)).apply({"params": params}, preprocess(image, test_clip.SMALL.image_size))


def text_features(params):
    return UMT5(low(test_umt5.SMALL)).apply({"params": params}, test_umt5.IDS, test_umt5.MASK)


PROGRAMS = {
    "dit": (velocity, lambda: test_dit.case(test_dit.I2V)),
    "dit, one pass": (one_pass, lambda: test_dit.case(test_dit.I2V)),
    "clip": (clip_tokens, lambda: (test_clip.params(), jnp.zeros((1, 20, 30, 3)))),
    "umt5": (text_features, lambda: (test_umt5.params(),)),
    "encoder": (VAE(low(test_vae.SMALL)).encode_chunk, lambda: (test_vae.params(), test_vae.VIDEO)),
    "decoder": (VAE(low(test_vae.SMALL)).decode_chunk, lambda: (test_vae.params(), test_vae.LATENTS)),
}


def products(jaxpr, scope=""):
    """(layer, dtypes of the operands, precision) of every matrix product and convolution, those in loops too."""
    for equation in jaxpr.eqns:
        place = f"{scope}/{equation.source_info.name_stack}"
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            dtypes = {operand.aval.dtype.name for operand in equation.invars}
            yield place.split("/")[-1], dtypes, set(equation.params["precision"])
        inner = jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns"))
        for part in inner:
            if hasattr(part, "eqns"):
                yield from products(part, place)


def found(name):
    function, operands = PROGRAMS[name]
    with jax.default_matmul_precision("bfloat16"):
        return list(products(jax.make_jaxpr(function)(*operands())))


LONG = {"dit", "encoder"}  # "dit, one pass" and "decoder" hold their layers


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.long) if x in LONG else x for x in PROGRAMS])
def test_products_of_float32_ask_for_float32_and_no_others_do(name):
    all_products = found(name)
    assert all((precision == EXACT) == ("float32" in dtypes) for _, dtypes, precision in all_products)
    assert any("bfloat16" in dtypes for _, dtypes, _ in all_products)


@pytest.mark.parametrize("name", ["dit", "dit, one pass"])
def test_time_and_head_are_the_products_of_float32(name):
    exact = {layer for layer, _, precision in found(name) if precision == EXACT}
    assert exact == {"time_in", "time_out", "time_projection", "out"}
