"""Which keys a query may see, as runs: never a dense [queries, keys] array outside the reference.

Every mask of this library cuts the queries into chunks whose rows all see the same keys, and those keys are at most
three contiguous stretches (sink, window, own chunk). So a mask is a few integers, known when the program is traced;
what changes from call to call is only how far a cache is filled, `kv_len`, which is an array.
"""

import bisect
import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

MAX_RUNS = 3

Run = tuple[int, int]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("kv_len",), meta_fields=("query_ends", "runs"))
@dataclasses.dataclass(frozen=True)
class KeyRuns:
    """Queries [query_ends[c-1], query_ends[c]) see the keys of runs[c], and of those only the ones below kv_len.

    query_ends: where each chunk of queries ends, increasing; the last is the number of queries. Empty: no chunks, every
        query sees every key (below kv_len).
    runs: for each chunk up to `MAX_RUNS` half-open ranges (start, end) of keys, ascending and disjoint. A chunk
        without runs sees nothing: its attention output is 0.
    kv_len: scalar integer, may be traced; keys from kv_len on are never seen. They must be finite (a cache starts
        as zeros). None: no such bound.

    The first two are static (part of the pytree's structure), so they are hashable and free at run time.
    """

    query_ends: tuple[int, ...] = ()
    runs: tuple[tuple[Run, ...], ...] = ()
    kv_len: Int[Array, ""] | int | None = None

    def __post_init__(self) -> None:
        ends = tuple(operator.index(e) for e in self.query_ends)
        runs = tuple(tuple((operator.index(a), operator.index(b)) for a, b in chunk) for chunk in self.runs)
        if len(ends) != len(runs):
            raise ValueError(f"{len(ends)} query_ends but runs for {len(runs)} chunks; give one tuple of runs a chunk")
        if any(a >= b for a, b in zip((0, *ends), ends, strict=False)):
            raise ValueError(f"query_ends must be positive and strictly increasing, not {ends}")
        for c, chunk in enumerate(runs):
            _check_chunk(c, chunk)
        object.__setattr__(self, "query_ends", ends)
        object.__setattr__(self, "runs", runs)


def _check_chunk(c: int, chunk: tuple[Run, ...]) -> None:
    if len(chunk) > MAX_RUNS:
        raise ValueError(f"chunk {c} has {len(chunk)} runs {chunk}; at most {MAX_RUNS} are possible")
    for start, end in chunk:
        if not 0 <= start < end:
            raise ValueError(f"chunk {c}: run ({start}, {end}) must have 0 <= start < end; leave empty runs out")
    for (_, end), (start, _) in itertools.pairwise(chunk):
        if start < end:
            raise ValueError(f"chunk {c}: runs {chunk} must be ascending and disjoint, or keys would count twice")


def check(mask: KeyRuns | None, queries: int, keys: int) -> None:
    """Raises unless the mask fits so many queries and keys."""
    if mask is None:
        return
    if not isinstance(mask, KeyRuns):
        raise TypeError(f"mask must be None or a KeyRuns, not {type(mask).__name__}; dense masks are not supported")
    if mask.query_ends and mask.query_ends[-1] != queries:
        raise ValueError(f"the mask is for {mask.query_ends[-1]} queries (its last query_ends), but q has {queries}")
    furthest = max((end for chunk in mask.runs for _, end in chunk), default=0)
    if furthest > keys:
        raise ValueError(f"the mask's runs reach key {furthest}, but k has only {keys}")
    if mask.kv_len is not None:
        shape, dtype = jnp.shape(mask.kv_len), jnp.result_type(mask.kv_len)
        if shape or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"kv_len must be a scalar integer, not {dtype}{list(shape)}; use vmap for one a sample")


def pairs(mask: KeyRuns | None, queries: int, keys: int) -> int:
    """Pairs of a query and a key that it may see: of one head, as far as is known without kv_len."""
    if mask is None or not mask.query_ends:
        return queries * keys
    rows = (end - start for start, end in zip((0, *mask.query_ends), mask.query_ends, strict=False))
    return sum(n * sum(b - a for a, b in chunk) for n, chunk in zip(rows, mask.runs, strict=True))


def joined(parts: Sequence[KeyRuns | None], lengths: Sequence[int], queries: int) -> KeyRuns | None:
    """The mask of keys that lie one part behind the other, so many each, from the masks of the parts.

    Raises ValueError for more than one part where one has a kv_len: what is behind it would not begin at a place known.
    """
    if len(parts) == 1:
        return parts[0]
    if any(mask is not None and mask.kv_len is not None for mask in parts):
        raise ValueError("the masks of keys in several parts must be without kv_len")
    whole = [
        mask if mask is not None and mask.query_ends else KeyRuns((queries,), (((0, keys),),))
        for mask, keys in zip(parts, lengths, strict=True)
    ]
    ends = sorted({end for mask in whole for end in mask.query_ends})
    starts = (0, *itertools.accumulate(lengths[:-1]))
    runs = (
        tuple(
            (start + a, start + b)
            for mask, start in zip(whole, starts, strict=True)
            for a, b in mask.runs[bisect.bisect_left(mask.query_ends, end)]
        )
        for end in ends
    )
    return KeyRuns(tuple(ends), tuple(runs))


def dense(mask: KeyRuns | None, queries: int, keys: int) -> Bool[Array, "S K"]:
    """The mask as booleans, True where a query sees a key. For the reference and for tests: quadratic in length."""
    if mask is None or not mask.query_ends:
        seen = np.ones((queries, keys), bool)
    else:
        seen = np.zeros((queries, keys), bool)
        for first, last, chunk in zip((0, *mask.query_ends), mask.query_ends, mask.runs, strict=False):
            for start, end in chunk:
                seen[first:last, start:end] = True
    if mask is None or mask.kv_len is None:
        return jnp.asarray(seen)
    return seen & (jnp.arange(keys, dtype=jnp.int32) < mask.kv_len)[None, :]


def run_table(mask: KeyRuns) -> np.ndarray:
    """int32 [chunks, runs, 2]: (start, end) of each chunk's runs, padded with the empty run (0, 0).

    `runs` is the largest number that any chunk has, at least 1. Concrete: it may be read while tracing.
    """
    width = max([1, *(len(chunk) for chunk in mask.runs)])
    rows = [[*chunk, *[(0, 0)] * (width - len(chunk))] for chunk in mask.runs]
    return np.asarray(rows, np.int32).reshape(len(rows), width, 2)


def row_runs(mask: KeyRuns) -> Int32[Array, "S R 2"]:
    """`run_table` for every query row instead of every chunk: linear in the number of queries."""
    ends = jnp.asarray(mask.query_ends, jnp.int32)
    rows = jnp.arange(mask.query_ends[-1], dtype=jnp.int32)
    return jnp.asarray(run_table(mask))[jnp.searchsorted(ends, rows, side="right")]


def may_be_blind(mask: KeyRuns | None) -> bool:
    """Whether a query may see no key although others of its tile see some.

    `kv_len` alone cannot do that: where it is 0 there is no tile to walk.
    """
    if mask is None or not mask.query_ends:
        return False
    return mask.kv_len is not None or not all(mask.runs)


def tile_segments(
    mask: KeyRuns, queries: int, keys: int, block_q: int, block_k: int, *, keys_stay: bool = False
) -> np.ndarray:
    """int32 [tiles, segments, 3]: which tiles of keys each tile of queries walks, or the reverse with `keys_stay`.

    A segment (lo, split, hi): in tiles [lo, split) every pair is allowed and what is walked exists, in [split, hi) some
    pairs are. What is in no segment is not walked. Padded with the empty segment (0, 0, 0). kv_len does not enter: it
    is known too late.
    """
    some, every = _tile_map(mask.query_ends, mask.runs, queries, keys, block_q, block_k)
    if keys_stay:
        some, every = some.T, every.T.copy()
        every[:, queries // block_q :] = False
    rows = [_segments(s, e) for s, e in zip(some, every, strict=True)]
    width = max(1, *(len(row) for row in rows))
    return np.asarray([row + [(0, 0, 0)] * (width - len(row)) for row in rows], np.int32)


@functools.lru_cache(maxsize=64)
def _tile_map(
    query_ends: tuple[int, ...], runs: tuple[tuple[Run, ...], ...], queries: int, keys: int, block_q: int, block_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """bool [query tiles, key tiles], twice: some pair of the tile is allowed; every pair is, and all its keys exist."""
    key_tiles, query_tiles = -(-keys // block_k), -(-queries // block_q)
    first_key = np.arange(key_tiles) * block_k
    some, every = np.zeros((query_tiles, key_tiles), bool), np.ones((query_tiles, key_tiles), bool)
    for start, end, chunk in zip((0, *query_ends), query_ends, runs, strict=False):
        sees_some, sees_all = np.zeros(key_tiles, bool), np.zeros(key_tiles, bool)
        for lo, hi in _joined(chunk):
            sees_some |= (first_key < hi) & (first_key + block_k > lo)
            sees_all |= (lo <= first_key) & (first_key + block_k <= hi)
        tiles = slice(start // block_q, -(-end // block_q))
        some[tiles] |= sees_some
        every[tiles] &= sees_all
    return some, every


def _joined(chunk: tuple[Run, ...]) -> list[Run]:
    """The runs with touching ones made one."""
    out: list[Run] = []
    for lo, hi in chunk:
        out = [*out[:-1], (out[-1][0], hi)] if out and out[-1][1] == lo else [*out, (lo, hi)]
    return out


def _segments(some: np.ndarray, every: np.ndarray) -> list[tuple[int, int, int]]:
    """Stretches of tiles: wholly allowed ones, then partly allowed ones, then again."""
    out: list[tuple[int, int, int]] = []
    for tile in np.flatnonzero(some).tolist():
        lo, split, hi = out[-1] if out else (0, 0, -1)
        if tile == hi and every[tile] and split == hi:
            out[-1] = (lo, tile + 1, tile + 1)
        elif tile == hi and not every[tile]:
            out[-1] = (lo, split, tile + 1)
        else:
            out.append((tile, tile + bool(every[tile]), tile + 1))
    return out


def in_runs(rows: Int32[Array, "S R 2"], keys: Int32[Array, " K"]) -> Bool[Array, "S K"]:
    """True where the key of that index lies in one of the row's runs."""
    key = keys[None, None, :]
    return ((rows[:, :, :1] <= key) & (key < rows[:, :, 1:])).any(axis=1)
