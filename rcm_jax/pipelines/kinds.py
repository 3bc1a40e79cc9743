"""Kinds of network to which alone an option of a pipeline applies."""

import functools

from rcm_jax.options import option

WAN, BIDIRECTIONAL, CAUSAL = "wan", "bidirectional", "causal"
causal = functools.partial(option, only=[CAUSAL])
