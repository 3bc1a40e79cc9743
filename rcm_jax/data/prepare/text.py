"""Features of many prompts, a block at a time: a large text encoder is read once for each block."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Shaped

BLOCK = 256  # prompts; 4 MB each at Wan's size until they are cut to their length

Encode = Callable[[Sequence[str]], Shaped[np.ndarray, "B L D"]]


def features(encode: Encode, prompts: Sequence[str], block: int = BLOCK) -> Iterator[Shaped[np.ndarray, "l D"]]:
    """Of each prompt in order, without the zeros after it."""
    for start in range(0, len(prompts), block):
        for row in encode(prompts[start : start + block]):
            yield cut_to_length(row)


def cut_to_length(features: Shaped[np.ndarray, "L D"]) -> Shaped[np.ndarray, "l D"]:
    """At least one row is left."""
    rows = np.flatnonzero(features.any(axis=1))
    return np.array(features[: rows[-1] + 1 if len(rows) else 1])
