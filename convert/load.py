"""A network straight from anybody's file to the devices."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from rcm_jax.convert.checkpoint import Checkpoint
from rcm_jax.convert.networks import with_dtype
from rcm_jax.convert.tensors import BLOCK_BYTES, Tensor, total_bytes
from rcm_jax.finite import check_finite
from rcm_jax.parallel import make_mesh, state_shardings
from rcm_jax.progress import byte_bar
from rcm_jax.types import Params


def load_params(
    source: Checkpoint, mesh: Mesh | None = None, *, dtype: str = "keep", part: str | None = None
) -> Params:  # fmt: skip
    """The network's parameters on the mesh, sharded by `parallel`'s table; without one on the default device.

    dtype: see `networks.with_dtype`. part: what is read, "decoder" of an autoencoder. Raises ValueError listing what
    does not fit the network, FloatingPointError for weights that are NaN or infinite.
    """
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    flat = with_dtype(source.ours(), dtype, source.network)
    flat = {name: tensor for name, tensor in flat.items() if part is None or name.startswith(f"{part}/")}
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
            place = f"{source.path}, {name}"
            if tensor.layers and tensor.nbytes > BLOCK_BYTES and _whole_layers(places[name]):
                arrays[name] = _by_layer(tensor, places[name], place, advance)
            else:
                arrays[name] = _at_once(tensor, places[name], place)
                advance(tensor.nbytes)
    return unflatten_dict(arrays, sep="/")


def _at_once(tensor: Tensor, sharding: Sharding, place: str) -> jax.Array:
    """Every device's part is read once, however many devices have it."""

    @functools.cache
    def part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        return check_finite(tensor.read(tuple(slice(*ends) for ends in bounds)), place)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        return part(tuple(s.indices(n)[:2] for s, n in zip(index, tensor.shape, strict=True)))

    return jax.make_array_from_callback(tensor.shape, sharding, read)


def _whole_layers(sharding: Sharding) -> bool:
    """Whether each layer of a stacked tensor lies on all devices of the sharding."""
    return isinstance(sharding, NamedSharding) and (not sharding.spec or sharding.spec[0] is None)


def _by_layer(tensor: Tensor, sharding: NamedSharding, place: str, advance: Callable[[int], object]) -> jax.Array:
    """Layer after layer into its place on the devices, so that the host holds one."""
    make = jax.jit(functools.partial(jnp.zeros, tensor.shape, tensor.dtype), out_shardings=sharding)
    put = jax.jit(jax.lax.dynamic_update_index_in_dim, static_argnums=3, donate_argnums=0, out_shardings=sharding)
    whole, of_layer = make(), NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    for i, layer in enumerate(tensor.layers):
        whole = put(whole, _at_once(layer, of_layer, f"{place}, layer {i}"), i, 0)
        whole.block_until_ready()  # or the host would hold the layers that wait for their turn
        advance(layer.nbytes)
    return whole
