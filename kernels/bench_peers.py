"""What the benchmark compares: name -> {pass: operands -> the pass, ready to run}. These are the peers in JAX."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rcm_jax.kernels import bench_torch, bench_triton
from rcm_jax.kernels.backends import load_backend
from rcm_jax.kernels.bench_clock import Ready
from rcm_jax.kernels.bench_shapes import Shape
from rcm_jax.kernels.tiles import KINDS, tiles_for

Operands = dict[str, jax.Array]
Passes = dict[str, Callable[[Operands], Ready]]
OF_A_PASS = {"forward": ("forward",), "tangent": ("tangent",), "forward+tangent": ("forward", "tangent"),
             "backward": ("dq", "dkv")}  # fmt: skip


def in_jax(function: Callable, operands: Any, **facts: Any) -> Ready:
    """A function of JAX, compiled for these operands."""
    run = jax.jit(function).lower(operands).compile()
    memory = run.memory_analysis()
    facts["temporary MiB"] = None if memory is None else memory.temp_size_in_bytes / 2**20
    return Ready(lambda: run(operands), facts=facts)


def ours(name: str, shape: Shape) -> Passes:
    """One of our backends. Tangent and backward get o and lse from its own forward, outside the time, as in the op;
    `forward+tangent` is one after the other."""
    backend, mask, scale = load_backend(name), shape.mask, shape.scale

    def forward(x: Operands) -> tuple[jax.Array, jax.Array]:
        return backend.forward(x["q"], x["k"], x["v"], mask, scale)

    def tangent(x: Operands) -> jax.Array:
        named = (x[n] for n in ("q", "k", "v", "o", "lse", "tq", "tk", "tv"))
        return backend.tangent(*named, mask, scale)

    def both(x: Operands) -> tuple[jax.Array, jax.Array]:
        o, lse = forward(x)
        return o, tangent(x | {"o": o, "lse": lse})

    def backward(x: Operands) -> tuple[jax.Array, ...]:
        return backend.backward(*(x[n] for n in ("q", "k", "v", "o", "lse", "do")), mask, scale)

    def after_forward(x: Operands) -> Operands:
        o, lse = jax.jit(forward)(x)
        return x | {"o": o, "lse": lse}

    def tiles(x: Operands, kind: str) -> dict[str, str]:
        return tiles_used(x, OF_A_PASS[kind]) if name == "pallas_triton" else {}

    return {
        "forward": lambda x: in_jax(lambda x: forward(x)[0], x, **tiles(x, "forward")),
        "tangent": lambda x: in_jax(tangent, after_forward(x), **tiles(x, "tangent")),
        "forward+tangent": lambda x: in_jax(both, x, **tiles(x, "forward+tangent")),
        "backward": lambda x: in_jax(backward, after_forward(x), **tiles(x, "backward")),
    }


def our_fused(name: str, shape: Shape) -> Passes:
    """o and to from one walk over the keys."""
    backend = load_backend(name)

    def fused(x: Operands) -> tuple[jax.Array, jax.Array]:
        named = (x[n] for n in ("q", "k", "v", "tq", "tk", "tv"))
        return backend.fused(*named, shape.mask, shape.scale)[::2]

    return {"forward+tangent": lambda x: in_jax(fused, x, **tiles_used(x, ("fused",)))}


def tiles_used(x: Operands, kinds: tuple[str, ...]) -> dict[str, str]:
    """The tiles that the table gives our kernels here: "dq 64x64, 4 warps, 2 stages"."""
    chosen = {kind: tiles_for(kind, x["q"], x["k"], x["v"]) for kind in kinds if kind in KINDS}
    words = (f"{k} {t.block_q}x{t.block_k}, {t.num_warps} warps, {t.num_stages} stages" for k, t in chosen.items())
    return {"tiles": "; ".join(words)}


def differentiable(attend: Callable, *, jvp: bool = False) -> Passes:
    """Of a function of q, k and v. The backward pass is timed alone: what it needs is kept from a forward pass."""

    def residuals(x: Operands) -> tuple[Any, jax.Array]:
        return jax.jit(lambda x: jax.vjp(attend, x["q"], x["k"], x["v"])[1])(x), x["do"]

    passes = {
        "forward": lambda x: in_jax(lambda x: attend(x["q"], x["k"], x["v"]), x),
        "backward": lambda x: in_jax(lambda kept: kept[0](kept[1]), residuals(x)),
    }
    if jvp:
        along = ("q", "k", "v"), ("tq", "tk", "tv")
        passes["forward+tangent"] = lambda x: in_jax(
            lambda x: jax.jvp(attend, *(tuple(x[n] for n in names) for names in along)), x
        )
    return passes


def dot_product(implementation: str, shape: Shape) -> Passes:
    """jax.nn.dot_product_attention: cudnn, or XLA's own with the whole matrix of scores."""
    if shape.runs:
        raise NotImplementedError("a mask of runs would have to be dense")
    if implementation == "xla" and shape.batch * shape.queries * shape.keys * shape.heads > 2**31:
        raise NotImplementedError("its scores would not fit the memory")
    lengths = {}
    if shape.mask is not None:
        lengths = {"key_value_seq_lengths": jnp.full(shape.batch, shape.seen_keys, jnp.int32)}
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation, **lengths)
    return differentiable(attend, jvp=implementation == "xla")


def by_tokamax(shape: Shape) -> Passes:
    """tokamax, which chooses its kernel."""
    import tokamax

    if shape.mask is not None:
        raise NotImplementedError("compared on dense shapes only")
    return differentiable(tokamax.dot_product_attention)


PEERS = ("pallas_triton", "pallas_fused", "xla", "naive", "cudnn", "tokamax", "rcm", "jvp_flash_attention",
         "torch", "torch_flex")  # fmt: skip


def peers(rcm: Path | None) -> dict[str, Callable[[Shape], Passes]]:
    """All of them by name; `rcm` is a checkout of rCM's published code."""
    functions = (
        functools.partial(ours, "pallas_triton"),
        functools.partial(our_fused, "pallas_triton"),
        functools.partial(ours, "xla"),
        functools.partial(dot_product, "xla"),
        functools.partial(dot_product, "cudnn"),
        by_tokamax,
        functools.partial(bench_triton.rcm, rcm),
        bench_triton.jvp_flash_attention,
        bench_torch.scaled_dot_product,
        bench_torch.flex,
    )
    return dict(zip(PEERS, functions, strict=True))
