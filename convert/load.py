"""A network straight from anybody's file to the devices."""

import functools
from collections.abc import Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, Sharding

from rcm_jax.convert.checkpoint import Checkpoint
from rcm_jax.convert.networks import with_dtype
from rcm_jax.convert.tensors import Tensor, total_bytes
from rcm_jax.finite import check_finite
from rcm_jax.parallel import make_mesh, state_shardings
from rcm_jax.progress import byte_bar
from rcm_jax.types import Params


def load_params(source: Checkpoint, mesh: Mesh | None = None, *, dtype: str = "keep") -> Params:
    """The network's parameters on the mesh, sharded by `parallel`'s table; without one on the default device.

    dtype: see `networks.with_dtype`. Raises ValueError listing what does not fit the network, FloatingPointError for
    weights that are NaN or infinite.
    """
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    flat = with_dtype(source.ours(), dtype, source.network)
    return _placed(source, flat, state_shardings(mesh, flat))


def load_sharded(source: Checkpoint, shardings: Params, *, dtype: str = "keep") -> Params:
    """The network's parameters as jax Arrays, leaf by leaf; every device reads its own slice of the file.

    shardings: a tree like the parameters, of `jax.sharding.Sharding`s, e.g. from `parallel.state_shardings` of
    `wan.networks.abstract_network(source.config)`. Raises ValueError listing what does not fit.
    """
    flat = with_dtype(source.ours(), dtype, source.network)
    places = flatten_dict(shardings, sep="/")
    if set(places) != set(flat):
        raise ValueError(f"shardings do not fit the network; in one alone: {sorted(set(places) ^ set(flat))}")
    return _placed(source, flat, places)


def _placed(source: Checkpoint, flat: Mapping[str, Tensor], places: Mapping[str, Sharding]) -> Params:
    arrays, size = {}, total_bytes(flat)
    with byte_bar(f"load {source.network.name}", size) as advance:
        for name, tensor in flat.items():
            read = functools.partial(_checked, tensor, f"{source.path}, {name}")
            arrays[name] = jax.make_array_from_callback(tensor.shape, places[name], read)
            advance(tensor.nbytes)
    return unflatten_dict(arrays, sep="/")


def _checked(tensor: Tensor, place: str, part: tuple[slice, ...]) -> np.ndarray:
    return check_finite(tensor.read(part), place)
