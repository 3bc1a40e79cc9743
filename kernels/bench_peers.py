"""What the benchmark compares: name -> {pass: function of the operands}, or the reason for none."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.kernels.backends import load_backend
from rcm_jax.kernels.bench_shapes import Shape


def ours(name: str, shape: Shape) -> dict[str, Callable]:
    """One of our backends. The tangent and the backward get o and lse from outside, as they do in the op."""
    backend, mask, scale = load_backend(name), shape.mask, shape.width**-0.5

    def forward(x: dict) -> tuple:
        return backend.forward(x["q"], x["k"], x["v"], mask, scale)

    def residuals(x: dict) -> tuple:
        return x["q"], x["k"], x["v"], x["o"], x["lse"]

    return {
        "forward": lambda x: forward(x)[0],
        "tangent": lambda x: backend.tangent(*residuals(x), x["tq"], x["tk"], x["tv"], mask, scale),
        "fused": lambda x: backend.fused(x["q"], x["k"], x["v"], x["tq"], x["tk"], x["tv"], mask, scale)[::2],
        "backward": lambda x: backend.backward(*residuals(x), x["do"], mask, scale),
    }


def dot_product(implementation: str, shape: Shape) -> dict[str, Callable]:
    """jax.nn.dot_product_attention; the backward is timed as forward and backward together, less the forward."""
    if shape.mask is not None and (shape.mask.query_ends or implementation == "naive"):
        raise NotImplementedError("a mask of runs would have to be dense")
    lengths = {}
    if shape.mask is not None:
        lengths = {"key_value_seq_lengths": jnp.full(shape.batch, shape.mask.kv_len, jnp.int32)}
    name = "xla" if implementation == "naive" else implementation
    if name == "xla" and shape.queries * shape.keys * shape.heads > 2**31:
        raise NotImplementedError("its scores would not fit the memory")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, implementation=name, **lengths)

    passes = {
        "forward": lambda x: attend(x["q"], x["k"], x["v"]),
        "forward + backward": lambda x: jax.vjp(attend, x["q"], x["k"], x["v"])[1](x["do"]),
    }
    if name == "xla":
        passes["fused"] = lambda x: jax.jvp(attend, (x["q"], x["k"], x["v"]), (x["tq"], x["tk"], x["tv"]))
    return passes


def by_tokamax(shape: Shape) -> dict[str, Callable]:
    import tokamax

    if shape.mask is not None:
        raise NotImplementedError("compared on dense shapes only")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return tokamax.dot_product_attention(q, k, v)

    return {
        "forward": lambda x: attend(x["q"], x["k"], x["v"]),
        "forward + backward": lambda x: jax.vjp(attend, x["q"], x["k"], x["v"])[1](x["do"]),
    }


def torch_peer(jvp: bool, shape: Shape) -> dict[str, Callable]:
    """torch's scaled_dot_product_attention, or the jvp_flash_attention package: (value, tangent) by its kernel."""
    import torch

    if not torch.cuda.is_available():
        raise NotImplementedError("torch sees no GPU")
    if shape.mask is not None:
        raise NotImplementedError("compared on dense shapes only")
    if jvp:
        from jvp_flash_attention.jvp_attention import JVPAttn

    def on_gpu(x: jax.Array) -> "torch.Tensor":  # [B, S, N, D] -> torch's [B, N, S, D]
        return torch.from_numpy(np.asarray(x, np.float32)).to("cuda", torch.bfloat16).transpose(1, 2).contiguous()

    def timed(x: dict, repeats: int) -> list[float]:
        q, k, v, tq, tk, tv = (on_gpu(x[n]) for n in ("q", "k", "v", "tq", "tk", "tv"))
        times = []
        for _ in range(repeats + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            if jvp:
                torch.func.jvp(lambda *x: JVPAttn.fwd_dual(*x), (q, k, v), (tq, tk, tv))
            else:
                torch.nn.functional.scaled_dot_product_attention(q, k, v)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return times[3:]

    return {"fused" if jvp else "forward": TimesItself(timed)}


@dataclasses.dataclass(frozen=True)
class TimesItself:
    """A peer outside JAX: (operands, repeats) -> milliseconds."""

    run: Callable[[dict, int], list[float]]


PEERS: dict[str, Callable[[Shape], dict[str, Callable]]] = {
    "pallas_triton": functools.partial(ours, "pallas_triton"),
    "xla": functools.partial(ours, "xla"),
    "naive": functools.partial(dot_product, "naive"),
    "cudnn": functools.partial(dot_product, "cudnn"),
    "tokamax": by_tokamax,
    "jvp_flash_attention": functools.partial(torch_peer, True),
    "torch": functools.partial(torch_peer, False),
}
