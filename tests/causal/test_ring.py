"""Which frames a ring holds, told by keys that are the numbers of their frames."""

import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.causal.cache import Geometry, Ring
from rcm_jax.chunks import ChunkPattern, block_causal
from rcm_jax.wan.layers import KeyValues

CASES = [
    (pattern, window, sink)
    for pattern in ("c1-1", "c1-2", "c3-1", "c2-2", "c3-3")
    for window, sink in ((None, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 2), (4, 0))
]


def geometry(pattern, frames):
    return Geometry(ChunkPattern.parse(pattern), frames, (1, 1), layers=1, heads=1, width=2, dtype="float32")


def numbered(frames):
    x = jnp.broadcast_to(jnp.asarray(frames, jnp.float32)[None, None, :, None, None], (1, 1, len(frames), 1, 2))
    return KeyValues(x, -x)


def seen(ring, told, cache, chunk):
    """The frames that a chunk sees, but its own."""
    filled = int(ring._filled(told, chunk))
    assert (cache.k == -cache.v).all()
    return sorted(np.asarray(cache.k[0, 0, :filled, 0, 0]).astype(int).tolist())


def visible(told, window, sink, chunk):
    """By the mask under which such a network is trained."""
    spans = told.pattern.spans(told.frames)
    runs = block_causal(spans, 1, window=window, sink=sink).runs[chunk]
    return [frame for a, b in runs for frame in range(a, b) if frame < spans[chunk][0]]


@pytest.mark.parametrize(("pattern", "window", "sink"), CASES)
def test_a_chunk_sees_what_its_mask_lets_it_see(pattern, window, sink):
    told = geometry(pattern, {"c1-2": 17, "c2-2": 16, "c3-3": 24}.get(pattern, 9))
    ring = Ring(window, sink)
    cache = ring.open(told, 1)
    for chunk, span in enumerate(told.pattern.spans(told.frames)):
        assert seen(ring, told, cache, chunk) == visible(told, window, sink, chunk)
        cache = ring.append(told, cache, numbered(range(*span)), jnp.int32(chunk))


@pytest.mark.parametrize(("pattern", "window", "sink"), CASES)
def test_keys_made_anew_are_of_the_same_frames(pattern, window, sink):
    """But for the sink: the oldest of the frames that are made anew come to stand there."""
    told = geometry(pattern, {"c1-2": 17, "c2-2": 16, "c3-3": 24}.get(pattern, 9))
    ring = Ring(window, sink)
    cache = ring.open(told, 1)
    for chunk, span in enumerate(told.pattern.spans(told.frames)):
        count = ring.anew_frames(told, chunk)
        whole = count == span[0]
        kept = numbered(range(span[0] - count, span[0]))
        anew = cache
        if chunk and not whole:
            anew = ring.with_sink(told, anew, kept)
        if chunk:
            anew = ring.renewed(told, anew, kept, chunk if whole else jnp.int32(chunk), whole=whole)
            stood = ring.sink_tokens(told)
            want = visible(told, window, sink, chunk)
            want = want if whole else [*range(span[0] - count, span[0] - count + stood), *want[stood:]]
            assert seen(ring, told, anew, chunk) == sorted(want)
        cache = ring.append(told, cache, numbered(range(*span)), jnp.int32(chunk))
