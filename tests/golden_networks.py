"""Golden checks of the networks: weights in Wan2.1's names go through the converter's table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.convert.dit import from_wan
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.dit import DiT
from tests.golden_common import Case, Check, channels_first, channels_last

ATTENTION = "auto"  # the backend of every network here; the command line sets it


def dit_config(config: dict, **changes) -> DiTConfig:
    """The network of a golden config."""
    sizes = DiTConfig(
        dim=config["dim"], ffn_dim=config["ffn_dim"], num_heads=config["num_heads"], num_layers=config["num_layers"],
        in_channels=config["in_dim"], out_channels=config["out_dim"], patch_size=config["patch_size"],
        freq_dim=config["freq_dim"], text_dim=config["text_dim"], text_len=config["text_len"],
        image_dim=config.get("clip_dim"), eps=config.get("eps", 1e-6), attention=ATTENTION,
    )  # fmt: skip
    return dataclasses.replace(sizes, **changes)


def dit_forward(case: Case) -> list[Check]:
    """Text to video, and image to video where the case has an image."""
    config = dit_config(case.config)
    params = from_wan(case.weights, config)
    x = jnp.concatenate([channels_last(case.inputs[name]) for name in ("x", "y") if name in case.inputs], axis=-1)
    t, context = jnp.asarray(case.inputs["t"]), case.inputs["context"]
    # features past a prompt's length are zeros in the file; the lengths say so once more
    for row, length in zip(context, case.inputs["context_lens"], strict=True):
        assert not row[length:].any()
    image = case.inputs.get("clip_fea")
    v = jax.jit(DiT(config).apply)({"params": params}, x, t, context, image)

    one = DiT(dataclasses.replace(config, num_layers=1))
    first_block = {"params": params | {"blocks": jax.tree.map(lambda p: p[:1], params["blocks"])}}
    block0, time_emb, _ = one.apply(first_block, x, t, context, image, method="tokens")
    got = {"v": channels_first(v), "block0": block0, "time_emb": time_emb[:, 0]}
    if "text_emb" in case.outputs:
        got["text_emb"] = DiT(config).apply({"params": params}, context, method="embed_text")
    if image is not None:
        got["img_tokens"] = DiT(config).apply({"params": params}, image, method="embed_image")
    rel = 5e-6 if image is None else 8e-6
    return [Check(name, value, case.outputs[name], rel=rel, max_abs=5e-5) for name, value in got.items()]


def dit_jvp(case: Case) -> list[Check]:
    config = dit_config(case.config)
    params = from_wan(case.weights, config)
    x, t_x = (channels_last(case.inputs[name]) for name in ("x", "t_x"))
    t, t_t = (jnp.asarray(case.inputs[name]) for name in ("t", "t_t"))
    text = case.inputs["crossattn_emb"]

    @jax.jit
    def jvp(t_x, t_t):
        return jax.jvp(lambda x, t: DiT(config).apply({"params": params}, x, t, text), (x, t), (t_x, t_t))

    primal, tangent = jvp(t_x, t_t)
    _, x_only = jvp(t_x, jnp.zeros_like(t_t))
    limits = {"rel": 1e-5, "max_abs": 1e-4}
    return [
        Check("primal", channels_first(primal), case.outputs["primal"], rel=5e-6),
        Check("tangent", channels_first(tangent), case.outputs["tangent"], **limits),
        Check("tangent_x_only", channels_first(x_only), case.outputs["tangent_x_only"], **limits),
    ]


def role(case: Case, name: str) -> dict[str, np.ndarray]:
    """The weights of one network of a case that holds several."""
    return {key.removeprefix(f"{name}/"): w for key, w in case.weights.items() if key.startswith(f"{name}/")}


CASES = {"dit_t2v": dit_forward, "dit_i2v": dit_forward, "dit_jvp": dit_jvp}
