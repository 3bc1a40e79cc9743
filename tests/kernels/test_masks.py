import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.kernels import masks
from rcm_jax.kernels.masks import KeyRuns

QUERIES, KEYS = 9, 12


@st.composite
def key_runs(draw):
    """A mask over `QUERIES` queries and `KEYS` keys, chunks without any key included."""
    ends = [*sorted(draw(st.sets(st.integers(1, QUERIES - 1), max_size=3))), QUERIES]
    runs = []
    for _ in ends:
        cuts = sorted(draw(st.sets(st.integers(0, KEYS), max_size=2 * masks.MAX_RUNS)))
        runs.append(tuple(zip(cuts[::2], cuts[1::2], strict=False)))
    return KeyRuns(tuple(ends), tuple(runs), draw(st.none() | st.integers(0, KEYS + 2)))


def seen(mask, query, key):
    """The definition, one pair at a time."""
    if mask.kv_len is not None and key >= mask.kv_len:
        return False
    if not mask.query_ends:
        return True
    chunk = next(c for c, end in enumerate(mask.query_ends) if query < end)
    return any(start <= key < end for start, end in mask.runs[chunk])


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(key_runs())
def test_dense_and_rows_follow_the_definition(mask):
    masks.check(mask, QUERIES, KEYS)
    want = np.array([[seen(mask, i, j) for j in range(KEYS)] for i in range(QUERIES)])
    np.testing.assert_array_equal(masks.dense(mask, QUERIES, KEYS), want)
    runs_only = dataclasses.replace(mask, kv_len=None)
    rows = masks.in_runs(masks.row_runs(runs_only), jnp.arange(KEYS, dtype=jnp.int32))
    np.testing.assert_array_equal(rows, masks.dense(runs_only, QUERIES, KEYS))


def test_no_mask_and_a_mask_without_chunks():
    assert masks.dense(None, 2, 3).all()
    np.testing.assert_array_equal(masks.dense(KeyRuns(kv_len=2), 2, 3), [[True, True, False]] * 2)


def test_run_table_pads_with_the_empty_run():
    mask = KeyRuns((2, 3, 5), (((0, 2),), (), ((0, 1), (2, 4))))
    np.testing.assert_array_equal(masks.run_table(mask), [[[0, 2], [0, 0]], [[0, 0], [0, 0]], [[0, 1], [2, 4]]])
    np.testing.assert_array_equal(masks.run_table(KeyRuns((4,), ((),))), [[[0, 0]]])


def test_runs_are_structure_and_kv_len_is_data():
    traces = []

    @jax.jit
    def f(mask):
        traces.append(mask.runs)
        return masks.dense(mask, 4, 6).sum()

    block_causal = ((0, 3),), ((0, 6),)
    assert f(KeyRuns((2, 4), block_causal, 5)) == 2 * 3 + 2 * 5
    assert f(KeyRuns((2, 4), block_causal, 1)) == 4
    assert len(traces) == 1
    assert f(KeyRuns((2, 4), (((0, 3),), ()), 5)) == 2 * 3
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("ends", "runs", "message"),
    [
        ((2, 4), (((0, 1),),), "2 query_ends but runs for 1 chunks"),
        ((2, 2), ((), ()), r"strictly increasing, not \(2, 2\)"),
        ((0, 2), ((), ()), "positive"),
        ((2,), (((3, 3),),), r"run \(3, 3\) must have 0 <= start < end"),
        ((2,), (((-1, 3),),), r"run \(-1, 3\)"),
        ((2,), (((0, 3), (2, 4)),), "disjoint"),
        ((2,), (((0, 1), (2, 3), (4, 5), (6, 7)),), "4 runs .* at most 3"),
    ],
)
def test_impossible_runs(ends, runs, message):
    with pytest.raises(ValueError, match=message):
        KeyRuns(ends, runs)


def test_check_names_what_does_not_fit():
    mask = KeyRuns((2, 4), (((0, 3),), ((0, 6),)))
    masks.check(mask, 4, 6)
    with pytest.raises(ValueError, match=r"for 4 queries .* q has 5"):
        masks.check(mask, 5, 6)
    with pytest.raises(ValueError, match="reach key 6, but k has only 5"):
        masks.check(mask, 4, 5)
    with pytest.raises(ValueError, match=r"scalar integer, not int32\[2\]"):
        masks.check(KeyRuns(kv_len=jnp.array([1, 2])), 4, 6)
    with pytest.raises(ValueError, match="scalar integer, not float"):
        masks.check(KeyRuns(kv_len=2.0), 4, 6)
    with pytest.raises(TypeError, match="not ndarray; dense masks"):
        masks.check(np.ones((4, 6), bool), 4, 6)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(key_runs(), st.sampled_from([1, 2, 4]), st.sampled_from([2, 5, 8]), st.booleans())
def test_segments_walk_exactly_the_tiles_that_are_touched(mask, block_q, block_k, keys_stay):
    mask = KeyRuns(mask.query_ends, mask.runs)  # kv_len is the kernel's business
    table = masks.tile_segments(mask, QUERIES, KEYS, block_q, block_k, keys_stay=keys_stay)
    allowed = np.asarray(masks.dense(mask, QUERIES, KEYS))
    stays, walks = (-(-KEYS // block_k), -(-QUERIES // block_q))[:: 1 if keys_stay else -1]
    assert table.shape[0] == stays
    for i in range(stays):
        whole = {t for lo, split, _ in table[i] for t in range(lo, split)}
        partly = [t for _, split, hi in table[i] for t in range(split, hi)]
        assert len(partly) == len(set(partly))
        assert not whole & set(partly)
        for j in range(walks):
            query, key = (j, i) if keys_stay else (i, j)
            tile = allowed[query * block_q : (query + 1) * block_q, key * block_k : (key + 1) * block_k]
            expect_whole = tile.all() and (key + 1) * block_k <= KEYS
            expect_whole &= not keys_stay or (query + 1) * block_q <= QUERIES
            assert (j in whole) == expect_whole
            assert (j in partly) == (tile.any() and not expect_whole)


def test_which_masks_leave_a_row_of_a_walked_tile_without_keys():
    assert not masks.may_be_blind(None)
    assert not masks.may_be_blind(KeyRuns(kv_len=0))  # nothing is walked
    seen = KeyRuns((2, 4), (((0, 3),), ((0, 6),)))
    assert not masks.may_be_blind(seen)
    assert masks.may_be_blind(dataclasses.replace(seen, kv_len=5))
    assert masks.may_be_blind(KeyRuns((2, 4), (((0, 3),), ())))
