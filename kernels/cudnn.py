"""Attention's forward and backward pass by cuDNN, through `jax.nn.dot_product_attention`. It has no tangent, so it is
no backend by itself: `choice.py` takes single passes of it.

What jax.nn gives as lse has the dtype of o. In bfloat16 a lse of 10 is off by up to 0.03, and with it every probability
by 3 %. cuDNN has it in float32, as the scaled natural logarithm that ours is, and JAX keeps that for the backward pass,
among the leaves of what `jax.vjp` returns. `forward` takes it from there. `backward` puts o and lse where those of the
forward pass were, whose call nothing then uses and XLA removes. Where the leaves are not to be told apart, in another
version of JAX, `missing` says so and nothing is chosen from here.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from rcm_jax.kernels import xla
from rcm_jax.kernels.masks import KeyRuns

Query = Float[Array, "B S N D"]
Key = Float[Array, "B K N D"]  # and of the values: cuDNN wants one width
Lse = Float[Array, "B N S"]


def forward(q: Query, k: Key, v: Key, mask: KeyRuns | None, scale: float) -> tuple[Query, Lse]:
    """(o, lse), under no mask but kv_len. Lowered for another platform than CUDA, `xla` does it."""
    by_cudnn, by_xla = (functools.partial(f, scale=scale) for f in (_forward, xla.forward))
    return jax.lax.platform_dependent(q, k, v, mask, cuda=_whole(by_cudnn), default=by_xla)


def backward(
    q: Query, k: Key, v: Key, o: Query, lse: Lse, do: Query, mask: KeyRuns | None, scale: float
) -> tuple[Query, Key, Key]:
    """(dq, dk, dv), as `forward`. The last bits may differ from run to run, but under --xla_gpu_deterministic_ops."""
    by_cudnn, by_xla = (functools.partial(f, scale=scale) for f in (_backward, xla.backward))
    return jax.lax.platform_dependent(q, k, v, o, lse, do, mask, cuda=_whole(by_cudnn), default=by_xla)


@functools.cache
def missing() -> str | None:
    """Why cuDNN cannot be used on the GPUs of this process; None where it can."""
    x = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(_forward, mask=None, scale=1.0), x, x, x)
    except (NotImplementedError, RuntimeError) as reason:
        return str(reason).rstrip(".")
    return None


def _whole(f: Callable) -> Callable:
    """f as a device runs it, which nobody partitions. JAX lets the calls of cuDNN be partitioned, for which it must see
    them when it lowers a program, and inside of our primitives it does not; in a shard_map it does not ask."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = jax.sharding.AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,))
    if all(kind == AxisType.Manual for kind in mesh.axis_types):
        return f
    return jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)


def _forward(q: Query, k: Key, v: Key, mask: KeyRuns | None, scale: float) -> tuple[Query, Lse]:
    o, lse, _ = _kept(q, k, v, mask, scale)
    if mask is None or mask.kv_len is None:
        return o, lse
    some = mask.kv_len > 0
    return jnp.where(some, o, 0), jnp.where(some, lse, -jnp.inf)


def _backward(
    q: Query, k: Key, v: Key, o: Query, lse: Lse, do: Query, mask: KeyRuns | None, scale: float
) -> tuple[Query, Key, Key]:
    *_, gradient = _kept(q, k, v, mask, scale)
    dq, dk, dv = gradient(o, lse, do)
    if mask is None or mask.kv_len is None:
        return dq, dk, dv
    seen = (jnp.arange(k.shape[1], dtype=jnp.int32) < mask.kv_len)[None, :, None, None]
    return jnp.where(mask.kv_len > 0, dq, 0), jnp.where(seen, dk, 0), jnp.where(seen, dv, 0)


def _kept(q: Query, k: Key, v: Key, mask: KeyRuns | None, scale: float) -> tuple[Query, Lse, Callable]:
    """o and lse of the forward pass, and (o, lse, do) -> (dq, dk, dv). A kv_len of 0 counts as 1."""
    lengths = {}
    if mask is not None and mask.kv_len is not None:
        kv_len = jnp.clip(mask.kv_len, 1, k.shape[1]).astype(jnp.int32)
        lengths = {"key_value_seq_lengths": jnp.broadcast_to(kv_len, q.shape[:1])}
    attend = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn", **lengths)
    out, pull = jax.vjp(attend, q, k, v)
    leaves, tree = jax.tree.flatten(pull)
    B, S, N, _ = q.shape
    at_o = [i for i, x in enumerate(leaves) if x is out]
    at_lse = [i for i, x in enumerate(leaves) if (x.shape, x.dtype) == ((B, N, S), jnp.float32)]
    if len(at_o) != 1 or len(at_lse) != 1:
        raise NotImplementedError(f"jax.vjp keeps o {len(at_o)} times and lse {len(at_lse)} times for cuDNN, not once")

    def gradient(o: Query, lse: Lse, do: Query) -> tuple[Query, Key, Key]:
        given = [o if i == at_o[0] else lse if i == at_lse[0] else x for i, x in enumerate(leaves)]
        return jax.tree.unflatten(tree, given)(do)

    return out, leaves[at_lse[0]], gradient
