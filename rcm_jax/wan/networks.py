"""Parameters of every network: random ones of a DiT, and shapes and dtypes of all, nothing allocated."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rcm_jax.types import Params
from rcm_jax.wan.clip import CLIP
from rcm_jax.wan.config import CLIPConfig, DiTConfig, TinyVAEConfig, UMT5Config, VAEConfig
from rcm_jax.wan.dit import DiT
from rcm_jax.wan.tiny_vae import TinyVAE
from rcm_jax.wan.umt5 import UMT5
from rcm_jax.wan.vae import VAE


@functools.partial(jax.jit, static_argnames="model")
def init_params(model: DiTConfig, key: Array) -> Params:
    """Random weights of a network. They do not depend on the size of what it is shown."""
    video = jnp.zeros((1, *model.patch_size, model.in_channels))
    image = None if model.image_dim is None else jnp.zeros((1, 1, model.image_dim))
    return DiT(model).init(key, video, jnp.zeros((1,)), jnp.zeros((1, 1, model.text_dim)), image)["params"]


def abstract_params(model: DiTConfig) -> Params:
    """Shapes and dtypes of a network's parameters, nothing allocated."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


class Network(NamedTuple):
    """A kind of network: the class of its config, and its parameters' shapes and dtypes, nothing allocated."""

    config: type
    abstract_params: Callable[[Any], Params]


def _umt5(config: UMT5Config) -> Params:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(UMT5(config).init, jax.random.key(0), ids, ids)["params"]


def _clip(config: CLIPConfig) -> Params:
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    return jax.eval_shape(CLIP(config).init, jax.random.key(0), image)["params"]


NETWORKS = {
    "dit": Network(DiTConfig, abstract_params),
    "vae": Network(VAEConfig, lambda config: jax.eval_shape(VAE(config).init, jax.random.key(0))),
    "tiny_vae": Network(TinyVAEConfig, lambda config: jax.eval_shape(TinyVAE(config).init, jax.random.key(0))),
    "umt5": Network(UMT5Config, _umt5),
    "clip": Network(CLIPConfig, _clip),
}


@functools.cache
def abstract_network(config: Any) -> Params:
    """Shapes and dtypes of the parameters of any network, by its config."""
    return next(n.abstract_params(config) for n in NETWORKS.values() if isinstance(config, n.config))
