"""QVG: tokens are put into clusters of like direction, and only their distance from the cluster's mean is coded.

k-means on tokens of length 1, a fixed number of rounds. Sums over a cluster are products with a one-hot matrix: no
scatter, so the order of additions, and with it every bit, is the same each time.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int

from rcm_jax.quant.codes import to_bfloat16
from rcm_jax.quant.config import QuantConfig
from rcm_jax.quant.groups import Heads

Features = Float[Array, "sets S D"]  # a set: a video, or a head of one
Centres = Float[Array, "sets k D"]
Assignments = Int[Array, "sets S"]


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Which cluster each token is in, and the clusters' means, which restoring adds.

    centroids: [B, k, N, D], assignments: [B, S] where all heads share them; else [B, N, k, D] and [B, N, S].
    """

    centroids: BFloat16[Array, "..."]
    assignments: Int[Array, "..."]


jax.tree_util.register_dataclass(Clusters, ["centroids", "assignments"], [])


def _unit(x: Float[Array, "*sets D"]) -> Float[Array, "*sets D"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def _members(assignments: Int[Array, "*sets S"], k: int) -> Float[Array, "*sets S k"]:
    """1 where a token is in a cluster; each column divided by its sum is the cluster's mean."""
    return jax.nn.one_hot(assignments, k, dtype=jnp.float32)


def _counts(members: Float[Array, "*sets S k"]) -> Float[Array, "*sets k"]:
    return jnp.maximum(jnp.sum(members, axis=-2), 1.0)


def _nearest(features: Features, centres: Centres) -> Assignments:
    """By half the squared distance, but for the features' length, which is 1. Centres of empty clusters are zeros."""
    along = jnp.einsum("gsd,gkd->gsk", features, centres, precision="highest")
    return jnp.argmin(0.5 * jnp.sum(centres**2, axis=-1)[:, None] - along, axis=-1).astype(jnp.int32)


def _updated(features: Features, assignments: Assignments, k: int) -> Centres:
    members = _members(assignments, k)
    sums = jnp.einsum("gsk,gsd->gkd", members, features, precision="highest")
    return _unit(sums / _counts(members)[..., None])


def kmeans(features: Features, start: Centres, rounds: int) -> tuple[Assignments, Centres]:
    """The assignments of the last round, and the centres that follow from them."""

    def one(_, state):
        assignments = _nearest(features, state[1])
        return assignments, _updated(features, assignments, start.shape[1])

    first = jnp.zeros(features.shape[:2], jnp.int32)
    return jax.lax.fori_loop(0, rounds, one, (first, start))


def spaced(count: int, k: int) -> np.ndarray:
    """k of `count` tokens, evenly spaced from the first to the last: in float32 and from both ends, as published."""
    last, i = np.float32(count - 1), np.arange(k, dtype=np.float32)
    step = last / np.float32(max(k - 1, 1))
    return np.round(np.where(i < max(k // 2, 1), i * step, last - (k - 1 - i) * step)).astype(np.int32)


def _index_dtype(k: int) -> jnp.dtype:
    return jnp.uint8 if k <= 256 else jnp.int16 if k <= 32767 else jnp.int32


def _means(x: Heads, assignments: Int[Array, "..."], k: int, shared: bool) -> Float[Array, "..."]:
    members = _members(assignments, k)
    sums = jnp.einsum("bsk,bsnd->bknd" if shared else "bnsk,bsnd->bnkd", members, x, precision="highest")
    counts = _counts(members)
    return sums / (counts[..., None, None] if shared else counts[..., None])


def _spread(centroids: Float[Array, "..."], assignments: Int[Array, "..."]) -> Heads:
    """Each token's centroid."""
    index = assignments.astype(jnp.int32)
    if index.ndim == 2:
        return jnp.take_along_axis(centroids, index[..., None, None], axis=1)
    return jnp.take_along_axis(centroids, index[..., None], axis=2).swapaxes(1, 2)


def _start(features: Features, k: int, warm: Array | None) -> Centres:
    cold = features[:, spaced(features.shape[1], k)]
    if warm is None or warm.size != cold.size:
        return cold
    return jnp.where(jnp.any(warm != 0), _unit(warm.astype(jnp.float32).reshape(cold.shape)), cold)


def _over_heads(x: Heads, heads_axis: str | None) -> Float[Array, "B S D"]:
    mean = jnp.mean(x, axis=2)
    return mean if heads_axis is None else jax.lax.pmean(mean, heads_axis)


def _stage(
    x: Heads, config: QuantConfig, warm: Array | None, heads_axis: str | None
) -> tuple[Heads, Clusters, Array]:  # fmt: skip
    B, S, N, D = x.shape
    k, shared = min(config.qvg_clusters, S), config.qvg_share_assignments
    tokens = _over_heads(x, heads_axis) if shared else x.swapaxes(1, 2).reshape(B * N, S, D)
    features = _unit(tokens)
    assignments, centres = kmeans(features, _start(features, k, warm), config.qvg_iters)
    if k == 1:  # published so: along the mean token, not along the mean direction
        centres = _unit(jnp.mean(tokens, axis=1, keepdims=True))
    sets = (B,) if shared else (B, N)
    assignments, centres = assignments.reshape(*sets, S), centres.reshape(*sets, k, D)
    centroids = _means(x, assignments, k, shared)
    clusters = Clusters(to_bfloat16(centroids), assignments.astype(_index_dtype(k)))
    return x - _spread(centroids, assignments), clusters, to_bfloat16(centres)


def subtract(
    x: Heads, config: QuantConfig, warm: tuple[Array, ...], heads_axis: str | None = None
) -> tuple[Heads, tuple[Clusters, ...], tuple]:
    """What is left of x beside its clusters, each stage's clusters, and the centres that the next chunk starts from.

    `warm`: those of the last chunk, one array a stage; they serve where their number of clusters is this chunk's, and
    zeros are none. `heads_axis`: of vmap or shard_map, where the other heads are that share the clusters.
    """
    stages, centres = [], []
    warm = warm if config.qvg_warm_start else ()
    for stage in range(config.qvg_stages):
        x, clusters, centre = _stage(x, config, warm[stage] if stage < len(warm) else None, heads_axis)
        stages.append(clusters)
        centres.append(centre)
    return x, tuple(stages), tuple(centres) if config.qvg_warm_start else ()


def add(x: Heads, stages: tuple[Clusters, ...]) -> Heads:
    """The inverse of `subtract`, but for the rounding of centroids: the last stage is added first."""
    for clusters in reversed(stages):
        x = x + _spread(clusters.centroids.astype(jnp.float32), clusters.assignments)
    return x
