"""A stream between two of its chunks: what it follows, what it keeps, and what somebody said on the way."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from rcm_jax.causal.cache import Cache
from rcm_jax.causal.sinks import check_cuts
from rcm_jax.sampling.prompts import Cut, Script
from rcm_jax.sampling.recache import Recache
from rcm_jax.types import Latents
from rcm_jax.wan.layers import KeyValues

Caches = tuple[Cache, ...]  # one, and under guidance the unconditional one


class Course:
    """prompts: the keys of what the next chunk follows, and under guidance of the unconditional text. It alone holds
    the caches, which `free` takes from the device at once.

    keys: of a text. policy: of the caches, for its cuts; None has none. renew: what is made anew where the prompt
    changes, if anything.
    """

    def __init__(
        self, keys: Callable[[Float[Array, "B L D"]], KeyValues], script: Script, prompts: tuple[KeyValues, ...],
        caches: Caches, policy: object = None, renew: Recache | None = None,
    ):  # fmt: skip
        self.prompts, self.caches = prompts, caches
        self._keys, self._script, self._policy, self._renew = keys, script, policy, renew

    def turn(self, chunk: int) -> None:
        """Before a chunk: what it follows, where that is another text than the last one's."""
        text = self._script.change(chunk)
        if text is None:
            return
        self.prompts = (self._keys(text), *self.prompts[1:])
        if self._renew is not None:
            self.caches = (self._renew(self.prompts[0], self.caches[0]), *self.caches[1:])

    def put(self, x: Latents | None, caches: Caches) -> None:
        """After it: its latents, clean, and the caches with its keys."""
        self.caches = caches
        if self._renew is not None:
            self._renew.add(x)

    def say(self, chunk: int | None, what: Float[Array, "B L D"] | Cut) -> None:
        """From a chunk on, None where there will be none. Raises ArgumentError for a cut where the policy has none."""
        if isinstance(what, Cut):
            check_cuts(self._policy)
            self.caches = tuple(map(self._policy.request_cut, self.caches))
        if chunk is not None:
            self._script = self._script.sent(chunk, what)

    def free(self) -> None:
        for leaf in jax.tree.leaves(self.caches):
            leaf.delete()
