"""Checksums of a training state's numbers, made where they lie: the same on every mesh and any number of hosts.

What is summed are the numbers' bits, each times an odd weight of its own, modulo 2^32. A flipped bit changes a term by
a power of two times an odd number, which no modulus of 2^32 hides; two flips hide each other once in billions. Sums of
integers do not depend on their order, so a state may be checked on another mesh than it was saved from.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, UInt32

from rcm_jax.parallel import leaf_path

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(tree: PyTree, mesh: Mesh) -> dict[str, int]:
    """A checksum of each leaf, by its path. All processes of the mesh must call it."""
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    whole = NamedSharding(mesh, P())
    sums = jax.jit(lambda leaves: jnp.stack([_checksum(x) for x in leaves]), out_shardings=whole)
    return dict(zip(paths, sums(jax.tree.leaves(tree)).tolist(), strict=True))


def _checksum(x: Array) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
    position, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
