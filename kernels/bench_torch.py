"""PyTorch's attention on JAX's own buffers (DLPack), by the same clock."""

from collections.abc import Callable
from typing import Any

import jax

from rcm_jax.kernels.bench_clock import Ready, on_gpu
from rcm_jax.kernels.bench_shapes import Shape

Tensor = Any  # torch is not imported before it is asked for


def scaled_dot_product(shape: Shape) -> dict[str, Callable]:
    """torch.nn.functional.scaled_dot_product_attention, which chooses its kernel. No masks but a number of keys."""
    torch = _torch()
    if shape.runs:
        raise NotImplementedError("a mask of runs would have to be dense")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = shape.seen_keys
        return torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n])

    return _passes(torch, attend)


def flex(shape: Shape) -> dict[str, Callable]:
    """FlexAttention, compiled, with the mask as blocks: what torch has for masks of runs."""
    torch = _torch()
    if shape.mask is None:
        raise NotImplementedError("compared on masked shapes only: torch has the dense ones")
    from torch.nn.attention import flex_attention as module

    mask_mod = _mask_mod(torch, shape)
    blocks = module.create_block_mask(mask_mod, None, None, shape.queries, shape.keys, device=_device())
    flexible = torch.compile(module.flex_attention) if on_gpu() else module.flex_attention
    return _passes(torch, lambda q, k, v: flexible(q, k, v, block_mask=blocks))


def _mask_mod(torch: Any, shape: Shape) -> Callable:
    """The mask as FlexAttention asks for it: whether query i sees key j, by tables that are looked up."""
    import numpy as np

    from rcm_jax.kernels.masks import row_runs

    if not shape.runs:
        return lambda b, h, i, j: j < shape.seen_keys
    table = torch.from_numpy(np.array(row_runs(shape.mask))).to(_device())  # [S, R, 2]
    columns = [(table[:, r, 0].contiguous(), table[:, r, 1].contiguous()) for r in range(table.shape[1])]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j < 0
        for start, end in columns:
            seen = seen | ((j >= start[i]) & (j < end[i]))
        return seen & (j < shape.seen_keys)

    return sees


def _torch() -> Any:
    import torch

    if on_gpu() and not torch.cuda.is_available():
        raise NotImplementedError("torch sees no GPU")
    return torch


def _device() -> str:
    return "cuda" if on_gpu() else "cpu"


def _passes(torch: Any, attend: Callable) -> dict[str, Callable]:
    def tensor(x: jax.Array) -> Tensor:  # [B, S, N, D], seen as torch's [B, N, S, D]: no copy
        return torch.from_dlpack(jax.block_until_ready(x)).transpose(1, 2)

    def wait(out: Any) -> Any:
        if on_gpu():
            torch.cuda.synchronize()
        return out

    def arrays(out: tuple[Tensor, ...]) -> list[jax.Array]:
        wait(out)
        return [jax.dlpack.from_dlpack(o.detach().transpose(1, 2).contiguous()) for o in out]

    def forward(x: dict[str, jax.Array]) -> Ready:
        q, k, v = (tensor(x[name]) for name in "qkv")
        return Ready(torch.no_grad()(lambda: (attend(q, k, v),)), wait, arrays=arrays)

    def backward(x: dict[str, jax.Array]) -> Ready:
        inputs = [tensor(x[name]).detach().requires_grad_() for name in "qkv"]
        o, do = attend(*inputs), tensor(x["do"])
        return Ready(lambda: torch.autograd.grad(o, inputs, do, retain_graph=True), wait, arrays=arrays)

    return {"forward": forward, "backward": backward}
