"""What recipes start from: the published rCM defaults, as an ml_collections ConfigDict.

Each recipe edits this and documents its command, hardware and expected numbers. `run_config` turns the result, with
whatever the command line changed, into the library's frozen dataclasses.
"""

import dataclasses

from ml_collections import ConfigDict

from rcm_jax.training.config import RunConfig
from rcm_jax.wan.config import WAN_1_3B, WAN_14B, DiTConfig


def from_model(model: DiTConfig, teacher: str) -> ConfigDict:
    """Every setting at its published default around a network."""
    return ConfigDict(dataclasses.asdict(RunConfig(model=model, teacher=teacher)))


def get_config() -> ConfigDict:
    return from_model(WAN_1_3B, "teacher.safetensors")


def _causal_presets() -> dict[str, dict]:
    four = (15 / 16, 5 / 6, 5 / 8)
    return {
        "4step": {"steps_per_chunk": (4,), "middle": (four,)},
        "2step": {"steps_per_chunk": (4, 2), "middle": (four, (5 / 6,))},
        "2step_noisy_ctx": {"steps_per_chunk": (4, 2), "middle": (four, (5 / 8,)), "noisy_context_from": 1},
        "1step": {"steps_per_chunk": (4, 1), "middle": (four, ())},
    }


def wan_1_3b_causal(argument: str) -> ConfigDict:
    """What the causal recipes of the 1.3B share: 81 frames of 832 x 480 under the published settings, on eight GPUs of
    80 GB, of which four share a video.

    argument: a chunk pattern and a step preset, "c3-3,2step_noisy_ctx"; either may be left out (c1-1, 4step).
    """
    presets = _causal_presets()
    words = [word for word in argument.split(",") if word]
    unknown = [word for word in words if word not in presets and not word.startswith("c")]
    if unknown or len(words) > 2:
        raise ValueError(f"argument {argument!r} must be a chunk pattern and one of {list(presets)}, as in c3-3,2step")
    config = from_model(WAN_1_3B, "wan2.1_t2v_1.3b.safetensors")
    config.causal.pattern = next((word for word in words if word not in presets), "c1-1")
    config.causal.update(presets[next((word for word in words if word in presets), "4step")])
    config.data.update({"name": "shards", "batch_size": 64, "latent_shape": (21, 60, 104)})
    config.mesh.update({"fsdp": 2, "sequence": 4})
    config.microbatches = 32
    config.method.guidance = 3.0
    config.sigma_max = 1600.0
    config.checkpoint_every = 500
    return config


def on_14b(config: ConfigDict) -> ConfigDict:
    """A causal recipe of the 1.3B made one of the 14B: on 64 GPUs of 80 GB, of which eight share a video and 32 the
    weights. Batches are of 64 videos, so eight cuts of one a group; 512 GPUs need none."""
    config.model.update(dataclasses.asdict(WAN_14B))
    config.teacher = "wan2.1_t2v_14b.safetensors"
    config.data.batch_size = 64
    config.mesh.update({"fsdp": 4, "sequence": 8})
    config.microbatches = 8
    config.checkpoint_every = 500
    return config


def from_14b(config: ConfigDict) -> ConfigDict:
    """A causal consistency recipe of the 1.3B with the 14B as its teacher: on 32 GPUs of 80 GB, of which four share a
    video and all the weights, as published. The student starts from the causal 1.3B."""
    config.init, config.teacher = config.teacher, "wan_14b_causal_tf/teacher.safetensors"
    config.teacher_model = ConfigDict(dataclasses.asdict(WAN_14B))
    config.mesh.update({"fsdp": 8, "sequence": 4})
    config.microbatches = 4
    return config


def run_config(config: ConfigDict) -> RunConfig:
    """Raises ValueError or TypeError naming the setting that is wrong."""
    return RunConfig.from_dict(config.to_dict())
