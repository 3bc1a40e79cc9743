"""Where the prompt changes, the past under the new one (LongLive, arXiv 2509.22622): its keys are made anew."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rcm_jax.causal.cache import Cache
from rcm_jax.causal.network import CausalDiT
from rcm_jax.types import Latents, Params
from rcm_jax.wan.layers import KeyValues

RECACHES = ("all", "keep_sink")  # what is made anew: also the sink, which the frames of the window replace, or not


@functools.partial(jax.jit, static_argnames=("network", "keep_sink", "whole"), donate_argnames="cache")
def _renew(
    network: CausalDiT, params: Params, x: Latents, prompt: KeyValues, cache: Cache, chunk: Array, *, keep_sink: bool,
    whole: int | None,
) -> Cache:  # fmt: skip
    """whole: the chunk, where x is all that was before it."""
    chunk, all_before = (chunk, False) if whole is None else (whole, True)
    return network.renew(params, x, prompt, cache, chunk, keep_sink=keep_sink, whole=all_before)


class Recache:
    """Remembers the latest clean latents of a video, and makes a cache anew from them.

    Raises ValueError for a policy of the cache that cannot be made anew.
    """

    def __init__(self, network: CausalDiT, params: Params, which: str):
        if which not in RECACHES:
            raise ValueError(f"recache={which!r} must be one of {', '.join(RECACHES)}")
        network.renewed_frames(0)  # its error
        self._network, self._params, self._keep_sink = network, params, which == "keep_sink"
        self._parts: list[Latents] = []
        self._chunks = 0

    def add(self, x: Latents) -> None:
        """A chunk's latents, clean."""
        self._chunks += 1
        self._parts.append(x)
        needed = self._network.renewed_frames(self._chunks)
        while sum(part.shape[1] for part in self._parts[1:]) >= needed:
            self._parts.pop(0)

    def __call__(self, prompt: KeyValues, cache: Cache) -> Cache:
        """What the next chunk sees. The cache that is given is used up."""
        if not self._parts:
            return cache
        frames = self._network.renewed_frames(self._chunks)
        x = jnp.concatenate(self._parts, axis=1)[:, -frames:]
        whole = self._chunks if frames == self._network.pattern.start(self._chunks) else None
        chunk = jnp.int32(self._chunks)
        return _renew(
            self._network, self._params, x, prompt, cache, chunk, keep_sink=self._keep_sink, whole=whole
        )  # fmt: skip
