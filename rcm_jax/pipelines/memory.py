"""What sampling takes of a device's memory, estimated before anything is compiled, and what would fit."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rcm_jax.errors import ArgumentError
from rcm_jax.media.sizes import RESOLUTIONS, latent_shape
from rcm_jax.parallel import abstract_mesh, bytes_per_device
from rcm_jax.types import Params
from rcm_jax.wan.config import TAEW2_1, DiTConfig, TinyVAEConfig, VAEConfig
from rcm_jax.wan.networks import abstract_network
from rcm_jax.wan.tiny_vae import TinyVAE
from rcm_jax.wan.vae import VAE
from rcm_jax.worlds.wan.files import WanFiles

GIB = 2**30
SLACK = 1.1  # of what is computed: the compiler's padding, noise, text
# of a step of the autoencoder on a GPU, in features of four frames at full size and `dim` wide
PEAK_DECODE, PEAK_ENCODE = 5.1, 7
PEAK_RESIDUAL = 9.8  # the first, of Wan2.2's form, whose last levels are twice as wide
PEAK_TINY = 3.5  # of the tiny decoder, in features of one frame at full size
TILE = 32  # latent rows and columns of a tile


@dataclasses.dataclass(frozen=True)
class Job:
    """One sampling run. size: (width, height); fsdp and sequence: of the mesh; tiled: see `WanWorld`."""

    files: WanFiles
    size: tuple[int, int]
    num_frames: int
    dtype: str = "bfloat16"
    batch_size: int = 1
    fsdp: int = 1
    sequence: int = 1
    tiled: bool = False
    decoder_dtype: str = "bfloat16"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(T, H, W). Raises ValueError for a size or a number of frames that the networks do not take."""
        vae, dit = self.files.vae.config, self.files.dit[0].config
        return latent_shape(self.size, self.num_frames, space=vae.space, time=vae.time, patch=dit.patch_size[1])


def network_bytes(job: Job, loaded: int = 1) -> int:
    """Of the DiT on each device, with the weights of `loaded` networks."""
    c, itemsize = job.files.dit[0].config, 2 if job.dtype == "bfloat16" else 4
    weights = loaded * _weights(c, itemsize, job.fsdp, job.sequence)
    rows = math.ceil(job.batch_size / job.fsdp)
    tokens = rows * math.ceil(math.prod(c.grid(job.latent_shape)) / job.sequence)
    # Within 15% of what XLA compiles for an H200 (tests/pipelines/test_memory.py): the blocks take ffn + 4·dim numbers
    # a token, the exchange of heads 6·dim more, and of weights that are shared two layers are there whole.
    numbers = c.ffn_dim + (10 if job.sequence > 1 else 4) * c.dim
    gathered = 2 * _weights(c, itemsize, 1, job.sequence) // c.num_layers if job.fsdp > 1 else 0
    return int(weights + gathered + SLACK * tokens * itemsize * numbers)


def autoencoder_bytes(job: Job) -> int:
    """Of what decodes, or of what encodes an image, in float32, if that is more: weights, the state that a step hands
    to the next, and a step's features."""
    c, tiny = job.files.vae.config, job.files.tiny
    _, H, W = job.latent_shape
    h, w = (min(TILE, H), min(TILE, W)) if job.tiled else (H, W)
    itemsize = 2 if job.decoder_dtype == "bfloat16" else 4
    (weights, state), (encoder, past) = _autoencoder(c)
    pixels = c.time * (c.space // c.patch_size) ** 2  # of the full size, for one latent pixel
    features = (PEAK_RESIDUAL if c.residual else PEAK_DECODE) * pixels * c.width["decoder"]
    peak = itemsize * (weights + (state + features) * h * w)
    if tiny is not None:
        peak = itemsize * _tiny_numbers(tiny.config, H * W)
    network = job.files.dit[0].config
    if network.takes_image or network.image_first:
        seen = pixels // c.time if network.image_first else pixels  # one frame, or a video that begins with it
        peak = max(peak, 4 * (encoder + (past + PEAK_ENCODE * seen * c.width["encoder"]) * H * W))
    return int(peak)


@functools.cache
def _tiny_numbers(config: TinyVAEConfig, size: int) -> int:
    """Of the tiny decoder, for a frame of so many latent pixels."""
    params, latents = abstract_network(config), jnp.zeros((1, 1, 1, 1, config.z_dim))
    state = jax.eval_shape(functools.partial(TinyVAE.decode_chunk, TinyVAE(config)), params, latents)[1]
    features = config.decoder_widths[-1] * config.space**2
    return int(_numbers(params["decoder"]) + (_numbers(state) + PEAK_TINY * features) * size)


@functools.cache
def _weights(config: DiTConfig, itemsize: int, fsdp: int, sequence: int) -> int:
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, f"V{itemsize}"), _abstract(config))
    return bytes_per_device(abstract_mesh(1, fsdp, sequence, fsdp * sequence), params)


@functools.cache
def _abstract(config: DiTConfig) -> Params:
    return abstract_network(config)


@functools.cache
def _autoencoder(config: VAEConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many numbers the decoder's weights are, and its state for one latent pixel; and the encoder's."""
    params = abstract_network(config)
    latents, video = (1, 1, 1, 1, config.z_dim), (1, 1, config.space, config.space, 3)
    steps = ((VAE.decode_chunk, latents), (VAE.encode_chunk, video))
    states = [jax.eval_shape(functools.partial(f, VAE(config)), params, jnp.zeros(shape))[1] for f, shape in steps]
    halves = (params["decoder"], states[0]), (params["encoder"], states[1])
    return tuple((_numbers(weights), _numbers(state)) for weights, state in halves)


def _numbers(tree: PyTree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def device_limit() -> int | None:
    """Bytes that JAX may take of the smallest device; None where it does not say, as for CPUs."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return None if None in limits else min(limits)


def check_memory(job: Job, limit: int | None) -> None:
    """Raises ArgumentError that says what would fit, where the job does not. Without a limit all fits."""
    parts = {"the network": network_bytes(job), "the autoencoder": autoencoder_bytes(job)}
    if limit is None or max(parts.values()) <= limit:
        return
    needs = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in parts.items())
    width, height = job.size
    fitting = _what_fits(job, limit)
    words = "; ".join(words for words, _ in fitting) or "nothing of this network"
    arguments = {name: value for _, named in fitting for name, value in named.items()}
    raise ArgumentError(
        f"{width}x{height} with {job.num_frames} frames takes about {needs}, and JAX may use {limit / GIB:.1f} GiB of "
        f"this device; what would fit: {words}. "
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 lets JAX use more than three quarters of a GPU", **arguments,
    )  # fmt: skip


def check_weights(config: DiTConfig, limit: int | None, *, dtype: str, fsdp: int, sequence: int) -> None:
    """Raises ArgumentError where a network's weights alone do not fit: known before anything is fetched."""
    itemsize = 2 if dtype == "bfloat16" else 4
    sizes = {n: _weights(config, itemsize, n, sequence) for n in (fsdp, 2, 4, 8) if n >= fsdp}
    if limit is None or sizes[fsdp] <= limit:
        return
    enough = next((n for n, size in sorted(sizes.items()) if size <= limit), None)
    advice = "{fsdp} shares them between GPUs" if enough else "no {fsdp} up to 8 is enough"
    raise ArgumentError(
        f"the network's weights take {sizes[fsdp] / GIB:.1f} GiB in {dtype}, and JAX may use {limit / GIB:.1f} GiB of "
        f"this device; {advice}", fsdp=enough,
    )  # fmt: skip


def _what_fits(job: Job, limit: int) -> list[tuple[str, dict[str, Any]]]:
    """Ways to fit: words with the arguments' names between braces, and the arguments."""

    def fits(**changes) -> bool:
        changed = dataclasses.replace(job, **changes)
        return max(network_bytes(changed), autoencoder_bytes(changed)) <= limit

    out: list[tuple[str, dict[str, Any]]] = []
    files, tiles = job.files, {"vae_tiling": True} if job.files.tiny is None else {}
    if tiles and fits(tiled=True):
        out.append(("{vae_tiling}", tiles))
    tiny = dataclasses.replace(files, tiny=dataclasses.replace(files.vae, config=TAEW2_1))
    if tiles and files.vae.config.z_dim == TAEW2_1.z_dim and fits(tiled=False, files=tiny):
        out.append(("{decoder}", {"decoder": "tiny"}))
    if job.decoder_dtype == "float32" and fits(decoder_dtype="bfloat16"):
        out.append(("{vae_dtype}", {"vae_dtype": "bfloat16"}))
    if fits(dtype="bfloat16"):
        out.append(("{dtype}", {"dtype": "bfloat16"}))
    time, heads = job.files.vae.config.time, job.files.dit[0].config.num_heads
    if frames := [n for n in range(1, job.num_frames, time) if fits(num_frames=n)]:
        out.append(("{num_frames}", {"num_frames": frames[-1]}))
    smaller = RESOLUTIONS["480p"]["16:9"]
    if math.prod(smaller) < math.prod(job.size) and fits(size=smaller):
        out.append(("{resolution}", {"resolution": "480p"}))
    meshes = [(f, s) for n in (2, 4, 8) for f, s in ((1, n), (2, n // 2), (n, 1)) if f * s > job.fsdp * job.sequence]
    for fsdp, sequence in meshes:
        if heads % sequence == 0 and fits(fsdp=fsdp, sequence=sequence, tiled=bool(tiles)):
            mesh = {"fsdp": fsdp, "sequence": sequence} | tiles
            out.append((f"{fsdp * sequence} GPUs with {' '.join(f'{{{name}}}' for name in mesh)}", mesh))
            break
    return out
