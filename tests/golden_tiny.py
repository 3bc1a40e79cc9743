"""Golden checks of the tiny autoencoder, whole and streamed."""

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.convert.tiny_vae import from_wan
from rcm_jax.types import Params
from rcm_jax.wan.config import TinyVAEConfig
from rcm_jax.wan.tiny_vae import Decoder, TinyVAE, soft_clamp
from tests.golden_common import Case, Check, channels_first, channels_last


def _network(case: Case) -> tuple[TinyVAE, Params]:
    c = case.config
    config = TinyVAEConfig(c["decoder_widths"], c["encoder_width"], c["latent_channels"])
    return TinyVAE(config), from_wan(case.weights, config, [c["part"]])


def taew_decode(case: Case) -> list[Check]:
    net, params = _network(case)
    latents = jnp.asarray(channels_last(case.inputs["latent"]))
    raw, new = Decoder(net.config).apply({"params": params["decoder"]}, latents, mutable=["cache"])
    whole, _ = jax.jit(net.decode_chunk)(params, latents)
    parts = list(net.stream(params, latents))
    got = {
        "raw_untrimmed": channels_first(raw),
        "video": channels_first((whole + 1) / 2),
        "video_streamed": channels_first((jnp.concatenate(parts, axis=1) + 1) / 2),
        "after_clamp": channels_first(soft_clamp(latents)),
    }
    blocks = {3 + 6 * i + j: f"level_{i}_block_{j}" for i in range(3) for j in range(3)}
    memories = {f"memory_{i}": np.moveaxis(new["cache"][name]["past"][:, 0], -1, 1) for i, name in blocks.items()}
    checks = [Check(k, v, case.outputs[k], rel=1e-5, max_abs=5e-5) for k, v in (got | memories).items()]
    lengths = np.array([part.shape[1] for part in parts])
    return [*checks, Check("frames_per_latent", lengths, case.outputs["frames_per_latent"], exact=True)]


def taew_encode(case: Case) -> list[Check]:
    """The last chunk is padded where the whole clip is: at its end."""
    net, params = _network(case)
    video = 2 * channels_last(case.inputs["video"]) - 1
    padded = np.concatenate([video, video[:, -1:].repeat(-video.shape[1] % net.config.seen, axis=1)], axis=1)
    got = {"latent": jax.jit(net.encode_chunk)(params, padded)[0], "latent_streamed": net.encode(params, video)}
    return [Check(k, channels_first(v), case.outputs[k], rel=2e-5, max_abs=5e-5) for k, v in got.items()]


CASES = {"taew_decode": taew_decode, "taew_encode": taew_encode}
