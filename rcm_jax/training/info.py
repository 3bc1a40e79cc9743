"""What a run's weights need to be sampled from: the metadata of every file that it leaves."""

import json

from rcm_jax.model_file import ModelInfo
from rcm_jax.training.config import RunConfig

CAUSAL_FIELDS = ("pattern", "window", "sink", "steps_per_chunk", "middle", "noisy_context_from")


def model_info(config: RunConfig, note: str = "") -> ModelInfo:
    """Of the student and its average, or of the teacher that the run trains."""
    kind = "teacher" if config.method.name == "diffusion" else "student"
    causal = {name: getattr(config.causal, name) for name in CAUSAL_FIELDS} if config.causal.pattern else {}
    return ModelInfo(
        model=config.model, kind=kind, world=world_name(config), latent_shape=config.data.latent_shape,
        sigma_max=config.sigma_max, guidance=config.method.guidance, note=note,
        causal=json.loads(json.dumps(causal)),  # as it will be read
    )  # fmt: skip


def fake_info(config: RunConfig) -> ModelInfo | None:
    """Of the fake score, which is sampled as an ODE and makes videos as the student does; None without one."""
    if not config.method.uses_dmd:
        return None
    _, _, score = config.models
    return ModelInfo(
        model=score, kind="teacher", world=world_name(config), latent_shape=config.data.latent_shape,
        sigma_max=config.sigma_max, guidance=1.0, note="fake score",
    )  # fmt: skip


def world_name(config: RunConfig) -> str:
    """The world around the networks: the built-in one where its codec or shards of it give the batches, else Wan's."""
    return "toy" if "toy" in (config.data.name, config.data.null_text) else "wan"
