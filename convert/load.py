"""A network straight from anybody's file to the devices."""

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from rcm_jax.convert.checkpoint import Checkpoint
from rcm_jax.convert.networks import with_dtype
from rcm_jax.types import Params


def load_params(source: Checkpoint, *, dtype: str = "keep") -> Params:
    """The network's parameters on the default device, leaf by leaf. dtype: see `networks.with_dtype`.

    Raises ValueError listing what does not fit the network.
    """
    flat = with_dtype(source.ours(), dtype, source.network)
    return unflatten_dict({name: jax.device_put(tensor.read()) for name, tensor in flat.items()}, sep="/")


def load_sharded(source: Checkpoint, shardings: Params, *, dtype: str = "keep") -> Params:
    """The network's parameters as jax Arrays on a mesh, leaf by leaf; every device reads its own slice of the file.

    shardings: a tree like the parameters, of `jax.sharding.Sharding`s, e.g. from `parallel.state_shardings` of
    `model_file.abstract_network(source.config)`. Raises ValueError listing what does not fit.
    """
    flat = with_dtype(source.ours(), dtype, source.network)
    places = flatten_dict(shardings, sep="/")
    if set(places) != set(flat):
        raise ValueError(f"shardings do not fit the network; in one alone: {sorted(set(places) ^ set(flat))}")
    arrays = {
        name: jax.make_array_from_callback(tensor.shape, places[name], tensor.read) for name, tensor in flat.items()
    }
    return unflatten_dict(arrays, sep="/")
