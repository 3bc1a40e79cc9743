"""Meshes and the sharding table.

Parameters are named by logical axes in AXES; RULES says which mesh axis each logical axis lies on. The same table
shards parameters, EMA, fake score and optimiser moments, since all of them end in the same parameter names.
"""

import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

# parameter name (last two parts of its path) -> logical axes, without the leading "layers" of the stacked blocks
AXES: dict[str, tuple[str, ...]] = {
    "patch_embedding/kernel": ("patch", "embed"),
    "text_in/kernel": ("text", "embed"),
    "text_out/kernel": ("embed_in", "embed"),
    "time_in/kernel": ("frequency", "embed"),
    "time_out/kernel": ("embed_in", "embed"),
    "time_projection/kernel": ("embed", "modulation"),
    "q/kernel": ("embed", "heads"),
    "k/kernel": ("embed", "heads"),
    "v/kernel": ("embed", "heads"),
    "o/kernel": ("heads", "embed"),
    "ffn_in/kernel": ("embed", "mlp"),
    "ffn_out/kernel": ("mlp", "embed"),
    "out/kernel": ("embed", "patch"),
}
# logical axis -> mesh axis; what is not named here is on every device. Biases, norms and modulation tables are small.
RULES: dict[str, str] = {"embed": "fsdp"}
BATCH_AXES = ("data", "fsdp")


def mesh_shape(data: int, fsdp: int, devices: int) -> tuple[int, int]:
    """(data, fsdp) with data = -1 filled in. Raises ValueError where they do not multiply to the number of devices."""
    if fsdp < 1 or devices % fsdp:
        divisors = [n for n in range(1, devices + 1) if devices % n == 0]
        raise ValueError(f"mesh.fsdp={fsdp} does not divide the {devices} devices; use one of {divisors}")
    data = devices // fsdp if data == -1 else data
    if data * fsdp != devices:
        raise ValueError(f"mesh.data={data} times mesh.fsdp={fsdp} is not the number of devices, {devices}")
    return data, fsdp


def make_mesh(data: int = -1, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """A mesh with axes (data, fsdp) over all devices, or the given ones."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(data, fsdp, len(devices))
    return jax.make_mesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def spec(path: str, shape: tuple[int, ...], axis_sizes: dict[str, int]) -> P:
    """The sharding of one leaf of the state, from its path. A dimension the mesh axis does not divide is replicated."""
    axes = AXES.get("/".join(path.split("/")[-2:]), ())
    if not axes or len(shape) < len(axes):
        return P()
    axes = ("layers",) * (len(shape) - len(axes)) + axes
    names = [RULES.get(axis) for axis in axes]
    return P(*(n if n and size % axis_sizes[n] == 0 else None for n, size in zip(names, shape, strict=True)))


def leaf_path(path) -> str:
    """A JAX key path as "student/blocks/self_attn/q/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def state_shardings(mesh: Mesh | AbstractMesh, tree: PyTree) -> PyTree:
    """A NamedSharding for every leaf of a (possibly abstract) state."""
    sizes = dict(mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(leaf_path(path), leaf.shape, sizes)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples over all devices of both axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def bytes_per_device(mesh: Mesh | AbstractMesh, tree: PyTree) -> int:
    """Bytes that the tree's leaves take on one device under `state_shardings`."""
    shards = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize,
        tree, state_shardings(mesh, tree),
    )  # fmt: skip
    return sum(jax.tree.leaves(shards))
