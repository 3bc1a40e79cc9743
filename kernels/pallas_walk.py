"""What a Pallas kernel's body sees: rows of its operands, its arithmetic, and the walk over the other side's tiles."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Int32

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Rows:
    """`size` rows of an array of `length`, from row `first`. `offset` is where they are in the ref that a body has."""

    first: Int32[Array, ""]
    size: int
    length: int
    offset: Int32[Array, ""] | None  # None: the ref is these rows
    exist: bool = False  # all of them, for certain: nothing needs a mask to be loaded

    @property
    def index(self) -> Int32[Array, " R"]:
        return self.first + jnp.arange(self.size, dtype=jnp.int32)

    @property
    def inside(self) -> Bool[Array, " R"] | None:
        return None if self.exist or self.length % self.size == 0 else self.index < self.length


class Shared(NamedTuple):
    """An array of rows that each serve several tokens: in a slot so many `tokens`, `rows` for them, one for `each`."""

    tokens: int
    rows: int
    each: int

    def row(self, token: Int32[Array, " R"]) -> Int32[Array, " R"]:
        slot_tokens, each = jnp.int32(self.tokens), jnp.int32(self.each)
        slot = jax.lax.div(token, slot_tokens)
        return slot * self.rows + jax.lax.div(token - slot * slot_tokens, each)


@dataclasses.dataclass(frozen=True)
class Operand:
    """A ref [rows, padded width] of an array that is `width` wide, or a ref [rows] of one that has no width.

    sample: where the ref has all samples in front, the one that is meant. rows: where the ref has all rows of all
    samples, an operand that says in which of them a row of the array lies.
    shared: how to find the row of a token, where it serves several.
    code: what its numbers are codes of, where they are.
    """

    ref: Any
    width: int | None
    sample: Int32[Array, ""] | None = None
    rows: "Operand | None" = None
    shared: Shared | None = None
    code: str | None = None


Refs = dict[str, Operand | None]  # None: a tangent that is absent, a zero


def _view(operand: Operand, rows: Rows, part: tuple[int, int] | None = None) -> tuple[Any, Array | None]:
    """The part of the ref that holds the rows, and which of its elements exist (None: all)."""
    index = slice(None) if rows.offset is None else pl.ds(rows.offset, rows.size)
    if operand.width is None:
        return operand.ref.at[index], rows.inside
    which, parts = part or (0, 1)
    padded = operand.ref.shape[-1] // parts
    exists = None if rows.inside is None else rows.inside[:, None]
    if operand.width < padded * parts:
        columns = (jnp.arange(padded, dtype=jnp.int32) < operand.width)[None, :]
        exists = columns if exists is None else exists & columns
    if exists is not None:
        exists = jnp.broadcast_to(exists, (rows.size, padded))
    if part is not None or operand.rows is not None or operand.shared is not None:
        # arrays of both, as the interpreter takes none beside a slice
        row = rows.index if operand.rows is None else load(operand.rows, rows)
        row = row if operand.shared is None else operand.shared.row(row)
        column = which * padded + jnp.arange(padded, dtype=jnp.int32)
        index, columns = (jnp.broadcast_to(x, (rows.size, padded)) for x in (row[:, None], column[None]))
        return operand.ref.at[operand.sample, index, columns], exists
    at = (index, slice(None)) if operand.sample is None else (operand.sample, index, slice(None))
    return operand.ref.at[at], exists


def load(operand: Operand | None, rows: Rows, part: tuple[int, int] | None = None) -> Array | None:
    """The rows, 0 where there is nothing. An operand that is None stays None. part: (1, 2) is the second of two halves
    of all columns."""
    if operand is None:
        return None
    view, exists = _view(operand, rows, part)
    return plgpu.load(view, mask=exists, other=None if exists is None else 0)


def store(operand: Operand, rows: Rows, value: Array) -> None:
    view, exists = _view(operand, rows)
    plgpu.store(view, value.astype(operand.ref.dtype), mask=exists)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The products of a kernel, summed in float32, and its exponentials."""

    scale: float
    interpret: bool

    @property
    def factor(self) -> float:
        """What is still to be multiplied to scores to have them in base 2: where they are shifted, which costs nothing.

        A factor that is not positive would change which score is the largest: then they have it already.
        """
        return self.scale * LOG2_E if self.scale > 0 else 1.0

    def scores(self, a: Array, b: Array) -> Array:
        """scale · a bᵀ in base 2, but for `factor`."""
        s = self.dot_t(a, b)
        return s if self.scale > 0 else s * (self.scale * LOG2_E)

    def exp2(self, s: Array, shift: Array) -> Array:
        """exp2(factor · s - shift). In two instructions: the compiler's own exp2 has three more for tiny results."""
        if self.interpret:
            return jnp.exp2(self.factor * s - shift)
        bits = np.float32(self.factor).view(np.uint32)
        [p] = plgpu.elementwise_inline_asm(
            f"{{ .reg .f32 x; fma.rn.f32 x, $1, 0f{bits:08x}, $2; ex2.approx.ftz.f32 $0, x; }}",
            args=[s, jnp.broadcast_to(-shift, s.shape)],
            constraints="=f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(s.shape, jnp.float32)],
        )
        return p

    def dot(self, a: Array, b: Array) -> Array:
        """a b."""
        return self._product(a, b, 0)

    def dot_t(self, a: Array, b: Array) -> Array:
        """a bᵀ."""
        return self._product(a, b, 1)

    def _product(self, a: Array, b: Array, axis: int) -> Array:
        precision = None
        if b.dtype == jnp.float32:  # on tensor cores as three products of TF32 halves: float32 but for the last bits
            exact = jax.lax.Precision.HIGHEST
            precision = exact if self.interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Walk:
    """A tile of rows that stays, and the tiles of the other side that it visits, in `segments` where there are runs.

    A segment (lo, split, hi) is tiles [lo, split), where every pair exists and is allowed, then [split, hi), where
    loads and scores need masks. Without runs the segments follow from the lengths and kv_len.
    """

    stay: Rows
    keys_stay: bool
    length: int  # of the walked side
    block: int  # walked rows at a time
    segments: Any  # ref [segments, 3] or None
    runs: Any  # ref [2, runs, query rows] of starts and ends, or None
    kv_len: Int32[Array, ""] | None
    blind: bool  # some query may see no key at all while its tile is walked
    part: Int32[Array, ""] | None  # which of `parts` shares of each segment is walked; None: all of it
    parts: int

    def over(self, visit: Callable[[Rows, Any, bool], Any], carry: Any) -> Any:
        """visit(rows, carry, masked) -> carry, over all tiles that the walk touches."""

        def tiles(masked: bool) -> Callable:
            def step(i: Int32[Array, ""], carry: Any) -> Any:
                first = i * self.block
                return visit(Rows(first, self.block, self.length, first, exist=not masked), carry, masked)

            return step

        def segment(i: Int32[Array, ""] | int, carry: Any) -> Any:
            lo, split, hi = self._bounds(i)
            carry = jax.lax.fori_loop(lo, split, tiles(False), carry)
            return carry if isinstance(split, int) and split == hi else jax.lax.fori_loop(split, hi, tiles(True), carry)

        if self.segments is None or self.segments.shape[0] == 1:
            return segment(0, carry)
        return jax.lax.fori_loop(0, self.segments.shape[0], segment, carry)

    def _bounds(self, i: Int32[Array, ""] | int) -> tuple:
        """(lo, split, hi) of segment i, with kv_len taken into account."""
        tiles, whole = pl.cdiv(self.length, self.block), self.length // self.block
        if self.segments is not None:
            lo, split, hi = (self.segments[i, j] for j in range(3))
        else:
            lo, split, hi = 0, whole, tiles
        if self.kv_len is not None:
            lo, split, hi = self._below_kv_len(lo, split, hi)
        if self.part is None:
            return lo, split, hi
        share = (hi - lo + self.parts - 1) // self.parts
        first = jnp.minimum(lo + self.part * share, hi)
        last = jnp.minimum(first + share, hi)
        return first, jnp.clip(split, first, last), last

    def _below_kv_len(self, lo: Any, split: Any, hi: Any) -> tuple:
        if self.keys_stay:  # all queries see the tile's keys below kv_len
            first = self.stay.first
            some = (first < self.kv_len).astype(jnp.int32)
            every = (first + self.stay.size <= self.kv_len).astype(jnp.int32)
            return lo, lo + every * (split - lo), lo + some * (hi - lo)  # (a select of plain ints does not lower)
        full = self.kv_len // self.block
        hi = jnp.clip((self.kv_len + self.block - 1) // self.block, lo, hi)
        return lo, jnp.clip(full, lo, jnp.minimum(split, hi)), hi

    def scores(self, stay: Array, moving: Array, rows: Rows, arith: Arithmetic, masked: bool) -> Array:
        """`arith.scores`, and -inf where a `masked` tile's pair is not allowed."""
        s = arith.scores(stay, moving)
        return jnp.where(self._seen(rows), s, -jnp.inf) if masked else s

    def _seen(self, rows: Rows) -> Bool[Array, "stay moving"]:
        """Which pairs of the two tiles are allowed."""
        queries, keys = (rows, self.stay) if self.keys_stay else (self.stay, rows)
        key, query_axis = (keys.index[:, None], 0) if self.keys_stay else (keys.index[None, :], 1)
        shape = (self.stay.size, rows.size)
        seen = jnp.broadcast_to(key < (keys.length if self.kv_len is None else self.kv_len), shape)
        if self.runs is None:
            return seen
        at = slice(None) if queries.offset is None else pl.ds(queries.offset, queries.size)
        other = None if queries.inside is None else 0
        within = jnp.zeros(shape, bool)
        for r in range(self.runs.shape[1]):
            sides = (self.runs.at[jnp.int32(j), jnp.int32(r), at] for j in range(2))  # plain ints do not interpret
            bounds = (plgpu.load(side, mask=queries.inside, other=other) for side in sides)
            start, end = (jnp.expand_dims(x, query_axis) for x in bounds)
            within |= (start <= key) & (key < end)
        return seen & within
