"""Latents decoded to pixels and encoded again, as the published bidirectional trainer does before every step.

Whether that is meant is not known; what it changes is the autoencoder's own error. It takes the autoencoder on this
process's first device, for each sample.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.load import load_params
from rcm_jax.hub import find
from rcm_jax.parallel import make_mesh
from rcm_jax.wan.vae import VAE

Video = Float[np.ndarray, "T H W C"]


def open_reencoding(vae: str, channels: int) -> Callable[[Video], Video]:
    """Of an autoencoder's file, opened and checked now and loaded at the first video. In bfloat16, as published; what
    comes out is float32. Raises ValueError for a file that is none, or whose latents have another number of channels.
    """
    if not vae:
        raise ValueError("data.reencode=True needs the autoencoder's file: name it as previews.vae")
    path = find(vae, "previews.vae")
    if not path.exists():
        raise FileNotFoundError(f"previews.vae: there is no file at {path}")
    found = open_checkpoint(path)
    if found.network.name != "vae" or found.config.z_dim != channels:
        width = f" of {found.config.z_dim} channels" if found.network.name == "vae" else ""
        raise ValueError(
            f"previews.vae: {path} is a {found.network.title}{width}; the latents have {channels} channels"
        )
    network, here, params = VAE(dataclasses.replace(found.config, dtype="bfloat16")), None, None

    def reencode(latents: Video) -> Video:
        nonlocal here, params
        if here is None:
            here = make_mesh(devices=jax.local_devices()[:1])
            params = load_params(found, here, dtype="bfloat16")
        with jax.set_mesh(here):
            frames = network.decode(params, jnp.asarray(latents, jnp.float32)[None])
            return np.asarray(network.encode(params, jnp.clip(frames, -1, 1))[0], np.float32)

    return reencode
