"""What recipes start from: the published rCM defaults, as an ml_collections ConfigDict.

Each recipe edits this and documents its command, hardware and expected numbers. `run_config` turns the result, with
whatever the command line changed, into the library's frozen dataclasses.
"""

import dataclasses

from ml_collections import ConfigDict

from rcm_jax.training.config import RunConfig
from rcm_jax.wan.config import WAN_1_3B, DiTConfig


def from_model(model: DiTConfig, teacher: str) -> ConfigDict:
    """Every setting at its published default around a network."""
    return ConfigDict(dataclasses.asdict(RunConfig(model=model, teacher=teacher)))


def get_config() -> ConfigDict:
    return from_model(WAN_1_3B, "teacher.safetensors")


def run_config(config: ConfigDict) -> RunConfig:
    """Raises ValueError or TypeError naming the setting that is wrong."""
    return RunConfig.from_dict(config.to_dict())
