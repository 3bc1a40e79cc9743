"""rCM for Wan2.1-I2V-14B at 480p, 81 frames: the settings published for Wan2.1-T2V-14B, on pictures (docs/i2v.md).

python -m rcm_jax.train --config=wan_14b_i2v_rcm --dry_run --devices=64
"""

import dataclasses

from rcm_jax.configs import wan_14b_rcm
from rcm_jax.wan.config import WAN_14B_I2V


def get_config():
    config = wan_14b_rcm.get_config()
    config.model.update(dataclasses.asdict(WAN_14B_I2V))
    config.teacher = "wan2.1_i2v_14b_480p.safetensors"
    return config
