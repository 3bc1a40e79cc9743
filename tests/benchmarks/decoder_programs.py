"""A step of the decoder as it is compiled for a GPU that is not here: both forms of its convolutions, both dtypes.

    python -m tests.benchmarks.decoder_programs --size 60 104 --gpu h200 --forms planes:float32 solid:bfloat16

A step is one latent frame after the first, in the frames of a file (uint8). Moved: what instructions read and write,
each operand once; copies are what is written as it was read, but for its layout, its type, or a cut. Nothing
is run, and nothing autotuned: which algorithm cuDNN would take, and the memory it would work in, is not known.
"""

import argparse

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rcm_jax.aot.compile import Program, absent, compile_for, no_gpus
from rcm_jax.aot.costs import FREE, instruction_flops, seconds
from rcm_jax.aot.gpus import find_gpu
from rcm_jax.aot.hlo import Computation, Instruction, read
from rcm_jax.aot.traffic import moved_bytes
from rcm_jax.convert.networks import NETWORKS
from rcm_jax.parallel import make_mesh
from rcm_jax.wan import vae_layers
from rcm_jax.wan.config import TAEW2_1, VAEConfig
from rcm_jax.wan.networks import abstract_network
from rcm_jax.wan.tiny_vae import TinyVAE
from rcm_jax.wan.vae import VAE

FORMS = ("planes:float32", "planes:bfloat16", "solid:float32", "solid:bfloat16", "tiny:float32", "tiny:bfloat16")


def weights(network: VAE | TinyVAE, dtype: str, sharding: NamedSharding) -> dict:
    """The decoder's, in the dtypes that they are loaded in."""
    exact = next(n for n in NETWORKS if n.name == ("vae" if isinstance(network, VAE) else "tiny_vae")).full_precision
    flat = flatten_dict({"decoder": abstract_network(network.config)["decoder"]}, sep="/")
    placed = {
        name: x.update(dtype="float32" if exact.search(name) else dtype, sharding=sharding) for name, x in flat.items()
    }
    return unflatten_dict(placed, sep="/")


def step(form: str, gpu: str, size: tuple[int, int], frames: int) -> Program:
    """Compiled; `form` is as in FORMS."""
    kind, dtype = form.split(":")
    network = TinyVAE(type(TAEW2_1)(dtype=dtype)) if kind == "tiny" else VAE(VAEConfig(dtype=dtype))
    mesh = make_mesh(devices=absent(gpu, 1))
    here = NamedSharding(mesh, P())
    params = weights(network, dtype, here)
    latents = jax.ShapeDtypeStruct((1, frames, *size, 16), jnp.float32, sharding=here)
    if kind != "tiny":
        vae_layers.convolve = getattr(vae_layers, kind)
        jax.clear_caches()  # or a trace of the other form would serve
    with jax.set_mesh(mesh):
        state = jax.eval_shape(network.decode_chunk, params, latents)[1]
        state = jax.tree.map(lambda x: x.update(sharding=here), state)
        return compile_for(jax.jit(network.decode_chunk, donate_argnums=2), params, latents, state)


def moved(where: Computation, i: Instruction) -> int:
    if i.opcode in FREE:
        return 0
    return i.bytes + sum(where.by_name[name].bytes for name in set(i.operands) if name in where.by_name)


def row(form: str, gpu: str, size: tuple[int, int], frames: int) -> str:
    program = step(form, gpu, size, frames)
    module, found = read(program.hlo), find_gpu(gpu)
    work = [(where, i, times) for where, i, times in module.scheduled() if i.opcode not in FREE]
    tera = sum(times * instruction_flops(module, where, i) for where, i, times in work) / 1e12
    giga = sum(times * moved(where, i) for where, i, times in work) / 1e9
    copies = moved_bytes(module) / 1e9
    least = 1e3 * sum(times * seconds(module, where, i, found) for where, i, times in work)
    held, peak, launches = program.temporaries / 2**30, program.peak / 2**30, sum(times for *_, times in work)
    convolutions = sum(times for _, i, times in work if "__cudnn$conv" in i.attributes)
    return (
        f"| {form} | {tera:.2f} | {giga:.1f} | {copies:.1f} | {held:.2f} | {peak:.2f} | {launches} | {convolutions} | "
        f"{least:.1f} | {program.seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(60, 104), help="latent rows and columns")
    parser.add_argument("--frames", type=int, default=1, help="latent frames of a step")
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    args = parser.parse_args()
    no_gpus()
    print("| form | TFLOP | moved GB | copies GB | held GiB | peak GiB | launches | convolutions | least ms | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for form in args.forms:
        print(row(form, args.gpu, tuple(args.size), args.frames), flush=True)


if __name__ == "__main__":
    main()
