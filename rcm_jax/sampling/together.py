"""A chunk of each of several streams in one pass of the network, however far each of them is.

Every stream is a row of its own: its prompt, its cache, its chunk's number, its noise and its times. What they share is
static: the network, how many frames a chunk has and how many steps it takes. A row's numbers do not depend on the
others'.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from rcm_jax.causal.network import CausalDiT
from rcm_jax.sampling.course import Caches
from rcm_jax.sampling.rollout import Branch, sample_chunk
from rcm_jax.types import Latents, Params
from rcm_jax.wan.layers import KeyValues


class Row(NamedTuple):
    """A chunk to be made. noises: the start, then one a step that has one. start: to begin there instead. Its caches
    are used up."""

    prompts: tuple[KeyValues, ...]
    caches: Caches
    chunk: Int[Array, ""]
    noises: Float[Array, "n B t H W C"]
    times: Float[Array, " n"]
    start: Latents | None


class Steps(NamedTuple):
    """What rows that are made together share."""

    noisy_context: bool
    ode: bool
    guidance: float


@functools.partial(jax.jit, static_argnames=("network", "steps"), donate_argnames="caches")
def _together(
    network: CausalDiT, params: Params, rest: tuple[PyTree, ...], caches: tuple[Caches, ...], *, steps: Steps
) -> list[tuple[Latents, Caches]]:
    def one(rest: tuple, caches: Caches) -> tuple[Latents, Caches]:
        prompts, chunk, noises, times, start = rest
        branches = tuple(map(Branch, prompts, caches))
        x, branches = sample_chunk(network, params, branches, chunk, noises, times, start=start, **steps._asdict())
        return x, tuple(b.cache for b in branches)

    if len(caches) == 1:  # its cache stays where it is
        return [one(rest[0], caches[0])]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(rest, caches, strict=True))
    made = jax.vmap(one)(*stacked)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], made) for i in range(len(caches))]


def sample_together(
    network: CausalDiT, params: Params, rows: list[Row], steps: Steps
) -> list[tuple[Latents, Caches]]:  # fmt: skip
    """Of every row the chunk's latents [B, t, H, W, C], and its caches with the chunk's keys. Nothing is waited for."""
    rest = tuple((row.prompts, row.chunk, row.noises, row.times, row.start) for row in rows)
    return _together(network, params, rest, tuple(row.caches for row in rows), steps=steps)
