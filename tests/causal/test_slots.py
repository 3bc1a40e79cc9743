"""Which slots a stream batch's rows write to and see; the published numbers are in the golden kind v2v_stream."""

import jax.numpy as jnp
import pytest

from rcm_jax.causal.slots import SlotPast, SlotRing, Slots
from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError

PATTERN = ChunkPattern(2, 1)
ROOM = 16


def taken(ring, ends, frames, rest=1, last=None):
    """(slots that each pass takes, how many it sees) of one row; ends: frames at which the passes' chunks end."""
    slots, out = Slots(jnp.zeros(ROOM, jnp.int32), jnp.int32(0), jnp.int32(0)), []
    for i, (end, size) in enumerate(zip(ends, frames, strict=True)):
        flag = jnp.asarray(last is None or last[i])
        past = SlotPast(None, None, flag, flag, ring, rest, 1)
        stop, seen, slots = past._taken(slots, jnp.int32(end), size)
        out.append((int(stop) - size, int(stop), int(seen)))
    return out


def test_slots_fill_in_order_and_then_the_oldest_goes():
    got = taken(SlotRing(6, 3), [2, 3, 3, *range(4, 12)], [2, *[1] * 10])  # 3 twice: a warm-up and the chunk itself
    assert got[:6] == [(0, 2, 2), (2, 3, 3), (2, 3, 3), (3, 4, 4), (4, 5, 5), (5, 6, 6)]
    assert [stop for _, stop, _ in got[6:]] == [4, 5, 6, 4, 5]
    assert {seen for *_, seen in got[6:]} == {6}


def test_a_long_first_chunk_leaves_a_slot_out():
    """Published: a sink of 2 is one of 3."""
    two, three = (taken(SlotRing(6, sink), range(2, 12), [2, *[1] * 9]) for sink in (2, 3))
    assert two == three


def test_steps_of_a_chunk_share_its_slot():
    ends, frames = [1, 1, 2, 2, 3, 3, 4, 4, 5, 5], [1] * 10
    got = taken(SlotRing(3, 1), ends, frames, last=[False, True] * 5)
    assert [stop for _, stop, _ in got] == [1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


def test_chunks_of_two_frames():
    got = taken(SlotRing(7, 3), [1, 3, 5, 7, 9, 11], [1, 2, 2, 2, 2, 2], rest=2)
    assert [(start, stop) for start, stop, _ in got] == [(0, 1), (1, 3), (3, 5), (5, 7), (3, 5), (5, 7)]
    assert [seen for *_, seen in got] == [1, 3, 5, 7, 7, 7]


@pytest.mark.parametrize(
    ("ring", "pattern", "least"),
    [
        (SlotRing(3, 3), PATTERN, 4),
        (SlotRing(4, 3), ChunkPattern(1, 2), 5),
        (SlotRing(8, 3), ChunkPattern(1, 4), 9),
        (SlotRing(6, 6), ChunkPattern(1, 1), 7),
    ],
)
def test_something_must_be_left_to_write_to(ring, pattern, least):
    with pytest.raises(ArgumentError, match=f"num_kv_cache=.* must be at least {least} with num_sink_tokens="):
        ring.check(pattern)
    SlotRing(least, ring.num_sink_tokens).check(pattern)
