"""What a Pallas kernel of attention declares, and the call that is built from it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int32

from rcm_jax.kernels.masks import KeyRuns, may_be_blind, pairs, row_runs, tile_segments
from rcm_jax.kernels.pallas_walk import Arithmetic, Operand, Refs, Rows, Walk
from rcm_jax.kernels.tiles import Tiles, tiles_for

MIN_BLOCK = 16  # the narrowest operand of a matrix product; narrower heads are padded to it

FROM_A_STACK = {"k", "v", "k_scale", "v_scale"}

Side = Literal["queries", "keys"]
Typed = Array | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A program has a tile of the side that `stays`, of one head and sample; its `body` walks the tiles of the other.

    operands: the side that each has its rows on, in the order of the compiled kernel's arguments. An operand is
        [B, rows, N, width], [B, N, rows] where it is one number a row, or [rows, width / 2] where it is one table for
        all samples and heads. Those of `FROM_A_STACK` are the keys' and lie in a stack. Some may be None.
    outputs: the operand that each is as wide as, or None for one float32 number a row. Their rows are those that stay.
    """

    name: str  # in the table of tiles
    body: Callable[[Refs, Refs, Walk, Arithmetic], None]
    stays: Side
    operands: dict[str, Side]
    outputs: dict[str, str | None]

    @property
    def walks(self) -> Side:
        return "keys" if self.stays == "queries" else "queries"

    def __call__(
        self, arrays: dict[str, Array | None], mask: KeyRuns | None, scale: float, tiles: Tiles | None, parts: int = 1,
        about: dict[str, dict[str, Any]] | None = None,
    ) -> tuple[Array, ...]:  # fmt: skip
        """The outputs over all tiles, heads and samples: on CUDA compiled, anywhere else interpreted.

        With a `first` among the arrays, k and v have more samples than q: q's are theirs from that one on. With `rows`
        [B, keys] k and v are one sample, in which each of q's has its keys there. `about` has what else some operands
        are, as fields of `Operand`. With several `parts` each walks its share of the other side, and has its own
        outputs: [parts, ...] in float32.
        """
        tiles = tiles or tiles_for(self.name, arrays["q"], arrays["k"], arrays["v"])
        present = {name: arrays[name] for name in self.operands if arrays.get(name) is not None}
        if mask is not None and mask.kv_len is not None:
            present["kv_len"] = jnp.asarray(mask.kv_len, jnp.int32).reshape(1)
        if arrays.get("first") is not None:
            present["first"] = jnp.asarray(arrays["first"], jnp.int32).reshape(1)
        if arrays.get("rows") is not None:
            present["rows"] = arrays["rows"]
        call = functools.partial(_call, self, tiles, scale, mask, parts, about or {})
        return jax.lax.platform_dependent(
            present, cuda=functools.partial(call, interpret=False), default=functools.partial(call, interpret=True)
        )


def _call(
    kernel: Kernel, tiles: Tiles, scale: float, mask: KeyRuns | None, parts: int,
    about: dict[str, dict[str, Any]], arrays: dict[str, Array], *, interpret: bool,
) -> tuple[Array, ...]:  # fmt: skip
    (B, S, N, _), K = arrays["q"].shape, arrays.get("rows", arrays["k"]).shape[1]
    sizes = {"queries": (S, tiles.block_q), "keys": (K, tiles.block_k)}
    (length, block), (walked_length, walked_block) = sizes[kernel.stays], sizes[kernel.walks]
    operands = {name: arrays[name] for name in kernel.operands if name in arrays}
    inputs = {}  # arrays, and the part of each that a program sees
    stacked = FROM_A_STACK & set(operands) if "first" in arrays or "rows" in arrays else set()
    for name, x in operands.items():
        spec = (
            _stack_spec(x, exact=name in about or name.endswith("scale"))
            if name in stacked
            else _row_spec(x, block if kernel.operands[name] == kernel.stays else None)
        )
        inputs[name] = x, spec
    inputs |= _mask_inputs(kernel, tiles, mask, S, K)
    scalar = pl.BlockSpec((1,), lambda i, n, b: (0,))
    inputs |= {name: (arrays[name], scalar) for name in ("kv_len", "first") if name in arrays}
    if "rows" in arrays:
        inputs["rows"] = arrays["rows"], pl.BlockSpec((None, K), lambda i, n, b: (b, 0))
    outputs = {name: _output(arrays, length, like) for name, like in kernel.outputs.items()}

    def program(*refs: Any) -> None:
        named = dict(zip((*inputs, *outputs), refs, strict=True))
        where = {}  # that operands of a stack lie
        if "rows" in named:
            where = {"sample": jnp.int32(0), "rows": Operand(named["rows"], None)}
        elif stacked:
            where = {"sample": named["first"][0] + jax.lax.rem(pl.program_id(2), jnp.int32(B))}
        ins: dict = dict.fromkeys(kernel.operands)
        for name, x in operands.items():
            ins[name] = _operand(named[name], x, **about.get(name, {}), **(where if name in stacked else {}))
        outs = {name: _operand(named[name], x) for name, x in outputs.items()}
        part = None if parts == 1 else jax.lax.div(pl.program_id(2), jnp.int32(B))
        stay = Rows(pl.program_id(0) * block, block, length, None)
        kv_len = jnp.minimum(named["kv_len"][0], K) if "kv_len" in named else None
        segments, runs = named.get("segments"), named.get("runs")
        walk = Walk(
            stay, kernel.stays == "keys", walked_length, walked_block, segments, runs, kv_len, may_be_blind(mask),
            part, parts,
        )  # fmt: skip
        kernel.body(ins, outs, walk, Arithmetic(scale, interpret))

    in_specs, out_specs = [spec for _, spec in inputs.values()], [_row_spec(x, block) for x in outputs.values()]
    out_shape = list(outputs.values())
    if parts > 1:  # one after the other in the grid's last axis, which counts samples
        in_specs = [_of_sample(spec, B) for spec in in_specs]
        out_specs = [_of_part(spec, B) for spec in out_specs]
        out_shape = [jax.ShapeDtypeStruct((parts, *x.shape), jnp.float32) for x in out_shape]
    call = pl.pallas_call(
        program,
        out_shape=out_shape,
        grid=(pl.cdiv(length, block), N, parts * B),
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name=f"attention_{kernel.name}",
    )
    with jax.named_scope(f"pairs_{pairs(mask, S, K)}"):  # for those who count a compiled program's FLOPs
        return tuple(call(*(x for x, _ in inputs.values())))


def _output(arrays: dict[str, Array], length: int, like: str | None) -> jax.ShapeDtypeStruct:
    B, _, N, _ = arrays["q"].shape
    if like is None:
        return jax.ShapeDtypeStruct((B, N, length), jnp.float32)
    return jax.ShapeDtypeStruct((B, length, N, arrays[like].shape[3]), arrays["q"].dtype)


def _of_sample(spec: pl.BlockSpec, samples: int) -> pl.BlockSpec:
    """For all parts the same."""
    return pl.BlockSpec(spec.block_shape, lambda i, n, z: spec.index_map(i, n, jax.lax.rem(z, jnp.int32(samples))))


def _of_part(spec: pl.BlockSpec, samples: int) -> pl.BlockSpec:
    """With an axis for the parts in front."""

    def index(i: Int32[Array, ""], n: Int32[Array, ""], z: Int32[Array, ""]) -> tuple:
        part = jax.lax.div(z, jnp.int32(samples))
        return part, *spec.index_map(i, n, z - part * samples)

    return pl.BlockSpec((None, *spec.block_shape), index)


def _operand(ref: Any, x: Typed, **where: Any) -> Operand:
    return Operand(ref, None if x.ndim == 3 else x.shape[-1], **where)


def _padded(width: int) -> int:
    """A head's width rounded up to a power of two."""
    return max(MIN_BLOCK, pl.next_power_of_2(width))


def _stack_spec(x: Typed, exact: bool) -> pl.BlockSpec:
    """Of a program's head all rows of all samples: which sample it reads is known only when it runs."""
    width = x.shape[3] if exact else _padded(x.shape[3])
    return pl.BlockSpec((*x.shape[:2], None, width), lambda i, n, b: (0, 0, n, 0))


def _row_spec(x: Typed, block: int | None) -> pl.BlockSpec:
    """Of a program's head and sample its own `block` rows, or (None) all."""

    def tile(i: Int32[Array, ""]) -> Int32[Array, ""] | int:
        return 0 if block is None else i

    if x.ndim == 2:
        return pl.BlockSpec((block or x.shape[0], _padded(2 * x.shape[1]) // 2), lambda i, n, b: (tile(i), 0))
    if x.ndim == 3:
        return pl.BlockSpec((None, None, block or x.shape[2]), lambda i, n, b: (b, n, tile(i)))
    return pl.BlockSpec((None, block or x.shape[1], None, _padded(x.shape[3])), lambda i, n, b: (b, tile(i), n, 0))


def _mask_inputs(
    kernel: Kernel, tiles: Tiles, mask: KeyRuns | None, S: int, K: int
) -> dict[str, tuple[Array, pl.BlockSpec]]:
    """What a walk needs of a mask's runs: the segments of the program's tile and the runs of its queries."""
    inputs = {}
    if mask is not None and mask.query_ends:
        keys_stay = kernel.stays == "keys"
        segments = jnp.asarray(tile_segments(mask, S, K, tiles.block_q, tiles.block_k, keys_stay=keys_stay))
        inputs["segments"] = segments, pl.BlockSpec((None, *segments.shape[1:]), lambda i, n, b: (i, 0, 0))
        runs = row_runs(mask).transpose(2, 1, 0)
        rows = S if keys_stay else tiles.block_q
        spec = pl.BlockSpec((*runs.shape[:2], rows), lambda i, n, b: (0, 0, 0 if keys_stay else i))
        inputs["runs"] = runs, spec
    return inputs
