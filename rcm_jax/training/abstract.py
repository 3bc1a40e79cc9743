"""A run's steps with the shapes and shardings of their arguments, nothing allocated: what is compiled to plan a run."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from rcm_jax.convert.networks import NETWORKS, with_dtype
from rcm_jax.convert.tensors import Tensor
from rcm_jax.data.batch import Batch
from rcm_jax.objectives.networks import Networks
from rcm_jax.parallel import batch_sharding, sharded_attention, state_shardings
from rcm_jax.training.config import RunConfig
from rcm_jax.training.schedule import step_names
from rcm_jax.training.state import TrainState, abstract_state, standing
from rcm_jax.training.step import Step, make_steps
from rcm_jax.types import Params
from rcm_jax.wan.config import CLIP_VIT_H, DiTConfig
from rcm_jax.wan.networks import abstract_network


def abstract_networks(config: RunConfig) -> Networks:
    """Shapes and dtypes of the networks that stand still: those that a loss reads, as their files are read."""
    _, teacher, score = config.models
    models = {"teacher": teacher, "score_teacher": score}
    names = standing(config, score_teacher=bool(config.score_teacher))
    return Networks(**{name: _as_read(models[name], config.teacher_dtype) for name in names})


def _as_read(model: DiTConfig, dtype: str) -> Params:
    flat = flatten_dict(abstract_network(model), sep="/")
    dit = next(network for network in NETWORKS if network.name == "dit")
    lazy = with_dtype({name: Tensor(x.shape, x.dtype, None) for name, x in flat.items()}, dtype or model.dtype, dit)
    return unflatten_dict({name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in lazy.items()}, sep="/")


def abstract_batch(config: RunConfig) -> Batch:
    """Shapes of a batch: latents and texts of full length, and what an image-to-video network takes besides; in
    bfloat16, as Wan's shards are, or in the built-in world's float32."""
    model, B, grid = config.model, config.data.batch_size, config.data.latent_shape
    dtype = jnp.bfloat16 if config.data.name == "shards" else jnp.float32

    def shape(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((B, *dims), dtype)

    extra = model.in_channels - model.out_channels
    return Batch(
        latents=shape(*grid, model.out_channels),
        text=shape(model.text_len, model.text_dim),
        condition=shape(*grid, extra) if extra else None,
        image=None if model.image_dim is None else shape(CLIP_VIT_H.tokens, model.image_dim),
    )


def abstract_steps(config: RunConfig, mesh: Mesh) -> tuple[dict[str, Step], tuple[TrainState, Networks, Batch]]:
    """The steps that the run takes on the mesh, by name, and the arguments of each, sharded as the run shards them."""
    state, batch = abstract_state(config), abstract_batch(config)
    networks = abstract_networks(config)
    null_text = np.random.default_rng(0).standard_normal((config.model.text_len, config.model.text_dim), np.float32)
    steps = make_steps(config, null_text, sharded_attention(mesh))
    steps = {name: steps[name] for name in step_names(config.method)}
    arguments = (
        _placed(state, state_shardings(mesh, state)),
        _placed(networks, state_shardings(mesh, networks)),
        jax.tree.map(lambda x: x.update(sharding=batch_sharding(mesh)), batch),
    )
    return steps, arguments


def _placed(tree, shardings):
    return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), tree, shardings)
