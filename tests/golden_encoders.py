"""Golden checks of what surrounds the DiT: autoencoder, text encoder, CLIP's image tower and its preprocessing."""

import jax.numpy as jnp
import numpy as np

from rcm_jax.convert import vae as vae_table
from rcm_jax.wan.config import VAEConfig
from rcm_jax.wan.vae import VAE
from tests.golden_common import Case, Check, channels_first, channels_last


def vae(case: Case) -> list[Check]:
    c = case.config
    sizes = dict(dim=c["dim"], z_dim=c["z_dim"], dim_mult=c["dim_mult"], num_res_blocks=c["num_res_blocks"])
    config = VAEConfig(**sizes, temporal_downsample=c["temperal_downsample"], **_scale(case))
    net, params = VAE(config), vae_table.from_wan(case.weights, config)
    latent = net.encode(params, channels_last(case.inputs["video"]))
    decoded = net.decode(params, latent)
    got = {
        "latent": latent,
        "decoded": decoded,
        "decoded_clamped": jnp.clip(decoded, -1, 1),
        "decoded_extra": net.decode(params, channels_last(case.inputs["z_extra"])),
    }
    return [Check(k, channels_first(v), case.outputs[k], rel=3e-5, max_abs=1e-4) for k, v in got.items()]


def _scale(case: Case) -> dict:
    """The published normalisation is the config's default; a case that uses it must have those numbers."""
    z = case.config["z_dim"]
    if case.config["scale"] == "none":
        return dict(mean=(0.0,) * z, std=(1.0,) * z)
    for name in ("mean", "std"):
        np.testing.assert_array_equal(case.inputs[name], np.float32(getattr(VAEConfig(), name)))
    return {}


CASES = {"vae": vae}
