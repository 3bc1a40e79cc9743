"""The Wan DiT in rcm_jax against the same network in PyTorch, on the CPU, in turn.

    python -m tests.benchmarks.torch_dit [--json OUT]

Forward, jvp (in the latents and the time) and the gradient of all parameters: 30 layers, dim 256, 4 heads, 256 tokens,
float32, batch 1, one set of random weights that goes through the converter. Before anything is timed the velocity, the
tangent and the gradient of the two must agree. PyTorch runs eagerly; its attention is scaled_dot_product_attention,
and an explicit softmax under torch.func.jvp, which SDPA's fused kernel refuses. The weights are in place and compiled
code is warm: times are of the call alone, compile times apart; XLA_FLAGS count. Memory is what one call adds at its
peak to the resident memory of a process of its own. Needs torch (`pip install torch==2.13.0` here) and rcm_jax.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as tf
from torch import nn

from rcm_jax.convert.dit import to_wan
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.dit import DiT
from rcm_jax.wan.rope import rope_table
from tests import benchmarks
from tests.benchmarks.cpu_profile import LATENT, MODEL
from tests.tiny import perturbed_params

TIME, TIME_TANGENT = 700.0, 100.0  # model time, and its tangent
OPERATIONS = ("forward", "jvp", "gradient")
TOLERANCE = 1e-4


# --- the network in PyTorch, under Wan2.1's names -------------------------------------------------------------------


class TorchAttention(nn.Module):
    def __init__(self, c: DiTConfig):
        super().__init__()
        self.heads, self.fused = c.num_heads, True
        self.q, self.k, self.v, self.o = (nn.Linear(c.dim, c.dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(c.dim, eps=c.eps) for _ in range(2))

    def forward(self, x, context, rope=None):
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if self.fused:
            o = tf.scaled_dot_product_attention(q, k, v)
        else:
            o = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v
        return self.o(o.transpose(1, 2).flatten(2))


def rotate(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class TorchBlock(nn.Module):
    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(c.dim, c.eps, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(c.dim, c.eps)
        self.self_attn, self.cross_attn = TorchAttention(c), TorchAttention(c)
        self.ffn = nn.Sequential(nn.Linear(c.dim, c.ffn_dim), nn.GELU("tanh"), nn.Linear(c.ffn_dim, c.dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, c.dim))

    def forward(self, x, e, text, rope):
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation + e).chunk(6, dim=1)
        h = self.norm1(x) * (1 + scale_a) + shift_a
        x = x + self.self_attn(h, h, rope) * gate_a
        x = x + self.cross_attn(self.norm3(x), text)
        return x + self.ffn(self.norm2(x) * (1 + scale_f) + shift_f) * gate_f


class TorchHead(nn.Module):
    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.head = nn.Linear(c.dim, int(np.prod(c.patch_size)) * c.out_channels)
        self.modulation = nn.Parameter(torch.zeros(1, 2, c.dim))

    def forward(self, x, e):
        shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class TorchDiT(nn.Module):
    """x [B, C, T, H, W], t [B], text [B, text_len, text_dim]."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.c = c
        self.patch_embedding = nn.Conv3d(c.in_channels, c.dim, c.patch_size, stride=c.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(TorchBlock(c) for _ in range(c.num_layers))
        self.head = TorchHead(c)
        self.rope = tuple(torch.from_numpy(np.array(z)) for z in rope_table(c.grid(LATENT), c.head_dim))
        half = c.freq_dim // 2
        self.frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)

    def forward(self, x, t, text):
        angle = t.double()[:, None] * self.frequency
        e = self.time_embedding(torch.cat((angle.cos(), angle.sin()), dim=-1).float())
        e_blocks = self.time_projection(e).unflatten(-1, (6, -1))
        text = self.text_embedding(text)
        x = self.patch_embedding(x)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, e_blocks, text, self.rope)
        patches = self.head(x, e).unflatten(-1, (*self.c.patch_size, -1)).unflatten(1, grid)
        # [B, f, h, w, p_t, p_h, p_w, C] -> [B, C, f p_t, h p_h, w p_w]
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


# --- the three operations on both sides -----------------------------------------------------------------------------


def inputs(c: DiTConfig) -> dict[str, np.ndarray]:
    """Channels-last latents, their tangent, the cotangent of the velocity, and the text."""
    random = np.random.default_rng(0)
    fields = {name: random.standard_normal((1, *LATENT, c.in_channels), np.float32) for name in ("x", "dx", "dv")}
    return fields | {"text": random.standard_normal((1, c.text_len, c.text_dim), np.float32)}


def jax_operations(c: DiTConfig, params, names=OPERATIONS):
    """{name: call}, each of which waits for its result; and seconds of compilation."""
    data = {name: jnp.asarray(z) for name, z in inputs(c).items()}
    t, dt = jnp.array([TIME]), jnp.array([TIME_TANGENT])

    def network(params, x, t):
        return DiT(c).apply({"params": params}, x, t, data["text"])

    def jvp(params, x, t, dx, dt):
        return jax.jvp(functools.partial(network, params), (x, t), (dx, dt))[1]

    def loss(params, x, t, dv):
        return (network(params, x, t) * dv).sum()

    functions = {
        "forward": (network, (params, data["x"], t)),
        "jvp": (jvp, (params, data["x"], t, data["dx"], dt)),
        "gradient": (jax.grad(loss), (params, data["x"], t, data["dv"])),
    }
    calls, compile_seconds = {}, {}
    for name in names:
        function, arguments = functions[name]
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        compile_seconds[name] = time.perf_counter() - start
        calls[name] = lambda compiled=compiled, arguments=arguments: jax.block_until_ready(compiled(*arguments))
    return calls, compile_seconds


def torch_operations(c: DiTConfig, state: dict[str, np.ndarray], names=OPERATIONS):
    network = TorchDiT(c)
    network.load_state_dict({name: torch.from_numpy(np.array(z)) for name, z in state.items()}, strict=True)
    data = {name: torch.from_numpy(z) for name, z in inputs(c).items()}
    x, dx, dv = (data[name].movedim(-1, 1).contiguous() for name in ("x", "dx", "dv"))
    t, dt = torch.tensor([TIME]), torch.tensor([TIME_TANGENT])
    parameters = dict(network.named_parameters())

    def fused(on: bool):
        for block in network.blocks:
            block.self_attn.fused = block.cross_attn.fused = on

    def forward():
        fused(True)
        with torch.inference_mode():
            return network(x, t, data["text"])

    def jvp():
        fused(False)
        with torch.no_grad():
            return torch.func.jvp(lambda x, t: network(x, t, data["text"]), (x, t), (dx, dt))[1]

    def gradient():
        fused(True)
        loss = (network(x, t, data["text"]) * dv).sum()
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    calls = {"forward": forward, "jvp": jvp, "gradient": gradient}
    return {name: calls[name] for name in names}


def disagreement(c: DiTConfig, ours: dict, theirs: dict) -> dict[str, float]:
    """Relative difference of the velocity, the tangent, and the tensor of the gradient that is off most."""
    errors = {}
    for name in ("forward", "jvp"):
        errors[name] = benchmarks.relative(np.moveaxis(np.asarray(ours[name]()), -1, 1), theirs[name]())
    want, got = theirs["gradient"](), to_wan(ours["gradient"](), c)
    errors["gradient"] = max(benchmarks.relative(got[name], want[name]) for name in want)
    return errors


# --- the runs -------------------------------------------------------------------------------------------------------


def variants(c: DiTConfig) -> dict[str, DiTConfig]:
    """Ours by what the backward pass computes again: nothing, what costs little, and most, as big networks train."""
    return {f"remat {name}": dataclasses.replace(c, remat=name) for name in ("none", "dots", "attention")}


def memory_of(side: str, operation: str, args) -> float:
    """MiB, from a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.torch_dit", "--memory_of", side, operation]
    command += ["--layers", str(args.layers), "--threads", str(args.threads), "--unroll", str(args.unroll)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**20


def measure_memory(c: DiTConfig, side: str, operation: str) -> int:
    params = perturbed_params(c, scale=0.02)
    if side == "torch":
        state = to_wan(params, c)
        del params
        call = torch_operations(c, state, (operation,))[operation]
    else:
        call = jax_operations(variants(c)[side], params, (operation,))[0][operation]
    call()
    return benchmarks.peak_memory(call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=MODEL.num_layers)
    parser.add_argument("--unroll", type=int, default=1, help="blocks that rcm_jax compiles in a row")
    parser.add_argument("--rounds", type=int, default=7, help="times that every side has its turn")
    parser.add_argument("--calls", type=int, default=5, help="timed calls a turn, of which the median counts")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; JAX takes as many as the process has cores")
    parser.add_argument("--no_memory", action="store_true", help="skip the processes that measure peak memory")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    parser.add_argument("--memory_of", nargs=2, metavar=("SIDE", "OP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    c = dataclasses.replace(MODEL, num_layers=args.layers, unroll=args.unroll)
    if args.memory_of:
        print(measure_memory(c, *args.memory_of))
        return

    where = benchmarks.machine("jax", "flax", "torch") | {"torch_threads": torch.get_num_threads()}
    params = perturbed_params(c, scale=0.02)
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{c.num_layers} layers, dim {c.dim}, {c.num_heads} heads, ffn {c.ffn_dim}, {count / 1e6:.1f} M parameters, "
          f"{np.prod(c.grid(LATENT))} tokens, {c.text_len} text tokens, batch 1, float32")  # fmt: skip
    theirs = torch_operations(c, to_wan(params, c))
    ours, compile_seconds, errors = {}, {}, {}
    for name, config in variants(c).items():
        ours[name], compile_seconds[name] = jax_operations(config, params)
        errors[name] = disagreement(c, ours[name], theirs)
        if not max(errors[name].values()) < TOLERANCE:
            raise AssertionError(f"{name} and PyTorch differ by {errors[name]}, more than {TOLERANCE}")
    worst = {operation: max(e[operation] for e in errors.values()) for operation in OPERATIONS}
    print("agree with PyTorch, relative: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()) + "\n")

    rows = []
    print(f"{'':9s} {'':15s} {'ms':>8s} {'ms/torch, median [min, max]':>28s} {'peak MiB':>9s} {'compile s':>10s}")
    for operation in OPERATIONS:
        calls = {"torch": theirs[operation]} | {name: calls[operation] for name, calls in ours.items()}
        seconds = benchmarks.time_in_turn(calls, args.rounds, args.calls)
        for side, values in seconds.items():
            r = benchmarks.ratio(values, seconds["torch"])
            peak = None if args.no_memory else memory_of(side, operation, args)
            built = compile_seconds[side][operation] if side in compile_seconds else 0.0
            rows.append({"operation": operation, "side": side, "seconds": values, "ratio": r, "peak_mib": peak,
                         "compile_seconds": built})  # fmt: skip
            print(f"{operation:9s} {side:15s} {1e3 * statistics.median(values):8.1f} {benchmarks.spread(r):>28s} "
                  f"{'-' if peak is None else f'{peak:.0f}':>9s} {built:10.1f}", flush=True)  # fmt: skip
    benchmarks.write_json(args.json, {"machine": where, "errors": errors, "rows": rows})


if __name__ == "__main__":
    main()
