"""Meshes, the sharding table, and attention over a sequence that lies on several devices.

Parameters are named by logical axes in AXES; RULES says which mesh axis each logical axis lies on. The same table
shards parameters, EMA, fake score and optimiser moments, since all of them end in the same parameter names.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree, Shaped

from rcm_jax.errors import ArgumentError
from rcm_jax.kernels.attention import Past, attention
from rcm_jax.kernels.masks import KeyRuns

# parameter name (last two parts of its path) -> logical axes, without the leading "layers" of the stacked blocks
AXES: dict[str, tuple[str, ...]] = {
    "patch_embedding/kernel": ("patch", "embed"),
    "text_in/kernel": ("text", "embed"),
    "text_out/kernel": ("embed_in", "embed"),
    "image_out/kernel": ("image", "embed"),
    "time_in/kernel": ("frequency", "embed"),
    "time_out/kernel": ("embed_in", "embed"),
    "time_projection/kernel": ("embed", "modulation"),
    "q/kernel": ("embed", "heads"),
    "k/kernel": ("embed", "heads"),
    "v/kernel": ("embed", "heads"),
    "k_img/kernel": ("embed", "heads"),
    "v_img/kernel": ("embed", "heads"),
    "o/kernel": ("heads", "embed"),
    "ffn_in/kernel": ("embed", "mlp"),
    "ffn_out/kernel": ("mlp", "embed"),
    "out/kernel": ("embed", "patch"),
}
BATCH_AXES = ("data", "fsdp")
SEQUENCE_AXIS = "sequence"
# logical axis -> mesh axes, over all of which it lies; what is not named here is on every device. Biases, norms and
# modulation tables are small. Devices that share a video share the weights, too.
RULES: dict[str, tuple[str, ...]] = {"embed": ("fsdp", SEQUENCE_AXIS)}
MESH_AXES = (*BATCH_AXES, SEQUENCE_AXIS)


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def mesh_shape(data: int, fsdp: int, sequence: int, devices: int) -> tuple[int, int, int]:
    """The mesh's shape with data = -1 filled in. Raises ValueError where it does not multiply to the devices."""
    for name, size in (("fsdp", fsdp), ("sequence", sequence)):
        if size < 1 or devices % size:
            raise ValueError(
                f"mesh.{name}={size} does not divide the {devices} devices; use one of {_divisors(devices)}"
            )
    data = devices // (fsdp * sequence) if data == -1 else data
    if data * fsdp * sequence != devices:
        raise ValueError(
            f"mesh.data={data} times mesh.fsdp={fsdp} times mesh.sequence={sequence} is not the number of devices, "
            f"{devices}"
        )
    return data, fsdp, sequence


def make_mesh(data: int = -1, fsdp: int = 1, sequence: int = 1, devices: list | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, sequence) over all devices, or the given ones."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(data, fsdp, sequence, len(devices))
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def sampling_mesh(fsdp: int, sequence: int, heads: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first fsdp * sequence of the devices (default: those here), for a network of so many heads.
    Raises ArgumentError for a mesh that is not to be had of them, or that does not divide the heads."""
    devices = jax.devices() if devices is None else devices
    if min(fsdp, sequence) < 1 or fsdp * sequence > len(devices):
        raise ArgumentError(
            f"{{fsdp}} times {{sequence}} must be at least 1 and at most the {len(devices)} devices", fsdp=fsdp,
            sequence=sequence,
        )  # fmt: skip
    if heads % sequence:
        raise ArgumentError(
            f"{{sequence}} must divide the {heads} heads; use one of {_divisors(heads)}", sequence=sequence
        )
    return make_mesh(1, fsdp, sequence, devices=list(devices[: fsdp * sequence]))


def abstract_mesh(data: int, fsdp: int, sequence: int, devices: int) -> AbstractMesh:
    """`make_mesh` for devices that are not here."""
    return AbstractMesh(mesh_shape(data, fsdp, sequence, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def spec(path: str, shape: tuple[int, ...], axis_sizes: dict[str, int]) -> P:
    """The sharding of one leaf of the state, from its path. A mesh axis that does not divide a dimension, or what the
    axes before it left of that, is not used: the dimension is replicated along it."""
    axes = AXES.get("/".join(path.split("/")[-2:]), ())
    if not axes or len(shape) < len(axes):
        return P()
    axes = ("layers",) * (len(shape) - len(axes)) + axes
    return P(*(_dividing(RULES.get(axis, ()), size, axis_sizes) for axis, size in zip(axes, shape, strict=True)))


def _dividing(names: tuple[str, ...], size: int, axis_sizes: dict[str, int]) -> str | tuple[str, ...] | None:
    """Those of the mesh axes that cut a dimension of that size into equal parts, one after the other."""
    taken: tuple[str, ...] = ()
    for name in names:
        if (count := axis_sizes.get(name, 1)) > 1 and size % count == 0:
            taken, size = (*taken, name), size // count
    return taken[0] if len(taken) == 1 else taken or None


def leaf_path(path) -> str:
    """A JAX key path as "student/blocks/self_attn/q/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def state_shardings(mesh: Mesh | AbstractMesh, tree: PyTree) -> PyTree:
    """A NamedSharding for every leaf of a (possibly abstract) state."""
    sizes = dict(mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(leaf_path(path), leaf.shape, sizes)), tree
    )


def stay_sharded(tree: PyTree) -> PyTree:
    """Under jit, the tree's leaves held where `state_shardings` has them on the mesh that is set: gradients, which the
    compiler would not always cut. As they are under no mesh of ours."""
    if (mesh := ours()) is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda s: s.spec, state_shardings(mesh, tree)))


def in_cuts(x: Shaped[Array, "B ..."], parts: int) -> Shaped[Array, "parts b ..."]:
    """A batch in equal cuts, each spread over the devices as the batch is: sample i is in cut i % parts, so that every
    device cuts what it has and nothing is sent."""
    cuts = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    if (mesh := ours()) is None:
        return cuts
    return jax.lax.with_sharding_constraint(cuts, P(None, batch_axes(mesh, cuts.shape[1])))


def ours() -> AbstractMesh | None:
    """The mesh that is set, if it has our axes and more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.size > 1 and set(MESH_AXES) <= set(mesh.axis_names) else None


def shard(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree's leaves put where `state_shardings` has them."""
    return jax.device_put(tree, state_shardings(mesh, tree))


def batch_axes(mesh: Mesh | AbstractMesh, batch: int) -> tuple[str, ...] | None:
    """The mesh axes over which so many samples lie: none where these do not divide them."""
    return BATCH_AXES if batch % math.prod(mesh.shape[name] for name in BATCH_AXES) == 0 else None


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples over all devices of both axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def local_rows(sharding: NamedSharding, batch: int) -> range:
    """Which of a batch's samples this process's devices hold: what it must read."""
    parts = [index[0].indices(batch) for index in sharding.addressable_devices_indices_map((batch,)).values()]
    return range(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def place_batch(batch: PyTree, sharding: NamedSharding, rows: range, size: int) -> PyTree:
    """A global batch of `size` samples on the devices, of which this process has read `rows`."""
    if len(rows) == size:
        return jax.device_put(batch, sharding)

    def place(x: np.ndarray) -> Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            return x[start - rows.start : stop - rows.start]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)


def cut_by_heads(cache: PyTree) -> PyTree:
    """Keys and values [layers, B, K, N, D] that stay from chunk to chunk, as `ulysses` wants them on the mesh that is
    set: heads over `sequence`, samples over the other axes, where these divide them. As they are under no mesh of
    ours."""
    if (mesh := ours()) is None:
        return cache
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, cache_spec(mesh, x.shape)), cache)


def cache_spec(mesh: Mesh | AbstractMesh, shape: tuple[int, ...]) -> P:
    """Where `cut_by_heads` leaves keys or values [layers, B, K, N, D], or those of one layer."""
    *layers, samples, _, heads, _ = shape
    heads = SEQUENCE_AXIS if heads % mesh.shape[SEQUENCE_AXIS] == 0 else None
    return P(*(None for _ in layers), batch_axes(mesh, samples), None, heads)


def bytes_per_device(mesh: Mesh | AbstractMesh, tree: PyTree) -> int:
    """Bytes that the tree's leaves take on one device under `state_shardings`."""
    shards = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize,
        tree, state_shardings(mesh, tree),
    )  # fmt: skip
    return sum(jax.tree.leaves(shards))


def sharded_attention(mesh: Mesh, attend: Callable = attention) -> Callable:
    """`attend` as it runs on a mesh: as it is on one device, else inside shard_map, since a kernel cannot be cut by the
    compiler. Batches lie on (data, fsdp) where these divide them, and sequences on `sequence`: see `ulysses`."""
    return attend if mesh.size == 1 else ulysses(mesh, attend)


def ulysses(mesh: Mesh, attend: Callable = attention) -> Callable:
    """`attend` for q, k, v [B, S, N, D] whose sequence is cut over the mesh: heads are exchanged for sequence.

    Returns a function of the same signature. Inside, every device holds all tokens of N / size heads (DeepSpeed
    Ulysses, arXiv 2309.14509): one all_to_all takes q, k and v there together, one brings o back, and a tangent takes
    one of each more. A length that the axis does not divide is padded, and the padding masked. Keys of another length
    than the queries (text) stay whole on every device, which then needs no exchange. A `past` has an exchange of its
    own, so that where it has no tangent none is exchanged; one that is `apart` is a cache, which lies cut by heads
    already (`cut_by_heads`).

    Raises ValueError for heads that the axis does not divide.
    """
    axis, size = SEQUENCE_AXIS, mesh.shape[SEQUENCE_AXIS]

    def exchanged(
        q: Float[Array, "B S N D"],
        k: Float[Array, "B K N D"],
        v: Float[Array, "B K N V"],
        *,
        mask: KeyRuns | None = None,
        past: Past | None = None,
        **static,
    ) -> Float[Array, "B S N V"]:
        (B, S, N, D), K = q.shape, k.shape[1]
        if N % size:
            raise ValueError(f"heads={N} must be divisible by mesh.{axis}={size}; use one of {_divisors(N)}")
        if K != S and mask is not None and mask.query_ends and size > 1:
            raise NotImplementedError("runs of keys need queries and keys of one length when the sequence is cut")
        own, cached = K == S, past is not None and past.apart
        if past is not None and not cached and size > 1 and not (own and past.k.shape[1] == S):
            raise NotImplementedError(f"a past of {past.k.shape[1]} keys, {K} keys and {S} queries need one length")

        def here(q: Array, k: Array, v: Array, mask: KeyRuns | None, past: Past | None) -> Array:
            given = static if past is None else static | {"past": past}
            if size == 1 or not own:
                return attend(q, k, v, mask=mask, **given)
            x = jax.lax.all_to_all(jnp.concatenate([q, k, v], axis=-1), axis, 2, 1, tiled=True)
            if past is not None and not cached:
                kv = jax.lax.all_to_all(jnp.concatenate(past[:2], axis=-1), axis, 2, 1, tiled=True)
                given["past"] = Past(*jnp.split(kv, (D,), axis=-1), past.mask)
            o = attend(*jnp.split(x, (D, 2 * D), axis=-1), mask=mask, **given)
            return jax.lax.all_to_all(o, axis, 1, 2, tiled=True)

        if short := -S % size:
            q = _longer(q, short)
            if own:
                k, v, mask = _longer(k, short), _longer(v, short), _without_padding(mask, S, short)
            if past is not None and not cached:
                past = Past(*(_longer(x, short) for x in past[:2]), _without_padding(past.mask, S, short))
        batch = batch_axes(mesh, B)
        cut, keys = P(batch, axis), P(batch, axis if own else None)
        in_past = cache_spec(mesh, past.k.shape) if cached else cut
        specs = (cut, keys, keys, P(), None if past is None else Past(in_past, in_past, P(), P(), P(), P()))
        run = jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=cut, check_vma=False)
        return run(q, k, v, mask, past)[:, :S]

    return exchanged


def _longer(x: Float[Array, "B S N D"], by: int) -> Float[Array, "B S+by N D"]:
    return jnp.pad(x, ((0, 0), (0, by), (0, 0), (0, 0)))


def _without_padding(mask: KeyRuns | None, length: int, short: int) -> KeyRuns:
    """The mask for `short` more tokens at the end, which see nothing and which nothing sees."""
    mask = KeyRuns() if mask is None else mask
    ends, runs = (mask.query_ends, mask.runs) if mask.query_ends else ((length,), (((0, length),),))
    return dataclasses.replace(mask, query_ends=(*ends, length + short), runs=(*runs, ()))
