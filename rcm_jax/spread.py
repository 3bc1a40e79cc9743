"""How a network's activations lie on the mesh that is set, and its weights while they are used. Without a mesh of ours
every function here leaves things as they are."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import repeat
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from rcm_jax.parallel import SEQUENCE_AXIS, batch_axes, leaf_path, ours
from rcm_jax.types import Params

ROOM = 4 * 2**30  # bytes of a device that weights gathered for long may take: those of the 1.3B are 2.8 GB


def gathered_product(x: Array, weights: Array, dimensions: Any, precision: Any = None, **how: Any) -> Array:
    """`lax.dot_general` with weights that lie on several devices: every device gathers these, for its own samples.
    Where activations are smaller than weights, the partitioner would gather the activations of the whole batch."""
    if ours() is not None and isinstance(weights, jax.core.Tracer):  # under jit
        weights = _everywhere(weights)
    return jax.lax.dot_general(x, weights, dimensions, precision, **how)


@jax.custom_jvp
def _everywhere(weights: Array) -> Array:
    return jax.lax.with_sharding_constraint(weights, P())


@_everywhere.defjvp
def _(weights: tuple[Array], moved: tuple[Array]) -> tuple[Array, Array]:
    """The tangent as it lies: transposed, a constraint of it would put the whole gradient on every device."""
    return _everywhere(*weights), moved[0]


def gathered_once(params: Params, dtype: str) -> Params:
    """A network's projections on every device, those of its blocks in the dtype that they are used in: for one that is
    called many times with the same weights. As they are where that takes more than ROOM: each call then gathers them,
    a layer at a time. A gradient is to be held by `stay_sharded`."""

    def whole(path: tuple, x: Array) -> Array:
        name = leaf_path(path)
        if not name.endswith("/kernel"):
            return x
        return jax.lax.with_sharding_constraint(x.astype(dtype) if name.startswith("blocks/") else x, P())

    blocks = sum(x.size for x in jax.tree.leaves(params["blocks"])) * jnp.dtype(dtype).itemsize
    return params if ours() is None or blocks > ROOM else jax.tree.map_with_path(whole, params)


def spread_tokens(x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """Samples held over (data, fsdp) and their tokens over `sequence`; as the compiler likes where these do not divide
    them."""
    if (mesh := ours()) is None or not isinstance(x, jax.core.Tracer):
        return x
    batch = batch_axes(mesh, x.shape[0]) or P.UNCONSTRAINED
    tokens = SEQUENCE_AXIS if x.shape[1] % mesh.shape[SEQUENCE_AXIS] == 0 else P.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, P(batch, tokens, P.UNCONSTRAINED))


def spread_samples(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Samples held over (data, fsdp), each whole on its devices; one that serves all videos on every device."""
    if (mesh := ours()) is None or not isinstance(x, jax.core.Tracer):
        return x
    batch = None if x.shape[0] == 1 else batch_axes(mesh, x.shape[0]) or P.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, P(batch))


def for_every_video(x: Float[Array, "b ..."], videos: int) -> Float[Array, "B ..."]:
    """What one sample has given to all videos, on every device for its own; x as it is where each has one."""
    if x.shape[0] == videos:
        return x
    return spread_samples(jnp.broadcast_to(x, (videos, *x.shape[1:])))


def for_every_token(rows: Float[Array, "B t D"], tokens: int) -> Float[Array, "B S D"]:
    """Each frame's row for each of its tokens, of which there are `tokens` in all.

    Where tokens lie on several devices, each spreads the rows of the frames that it has a part of. So the gradient,
    a sum over a frame's tokens, is summed on the device first, and the devices exchange rows: the partitioner would
    bring all tokens to every device, since its cuts are not between frames.
    """
    each = tokens // rows.shape[1]
    mesh = ours()
    size = 1 if mesh is None else mesh.shape[SEQUENCE_AXIS]
    if size == 1 or not isinstance(rows, jax.core.Tracer):
        return repeat(rows, "b t d -> b (t s) d", s=each)
    own = -(-tokens // size)
    frames = (own + 2 * (each - 1)) // each  # the most that a device's tokens are of

    def here(rows: Float[Array, "b t D"]) -> Float[Array, "b own D"]:
        start = jax.lax.axis_index(SEQUENCE_AXIS) * own
        room = jnp.pad(rows, ((0, 0), (0, frames), (0, 0)))  # or the slice would be moved back into the array
        touched = jax.lax.dynamic_slice_in_dim(room, start // each, frames, axis=1)
        spread = repeat(touched, "b t d -> b (t s) d", s=each)
        return jax.lax.dynamic_slice_in_dim(spread, start % each, own, axis=1)

    batch = batch_axes(mesh, rows.shape[0])
    run = jax.shard_map(here, in_specs=P(batch), out_specs=P(batch, SEQUENCE_AXIS), check_vma=False)
    return run(rows)[:, :tokens]
