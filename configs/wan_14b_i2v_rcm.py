"""rCM for Wan2.1-I2V-14B at 480p, 81 frames: the settings published for Wan2.1-T2V-14B, on pictures (docs/i2v.md).

    python -m rcm_jax.train --config=wan_14b_i2v_rcm --dry_run --devices=64

For 64 GPUs of 80 GB, as wan_14b_rcm: eight share a video, 32 the weights; 24.3 GiB of a GPU at most (docs/planning.md).
Nothing is published of its training, and it was not trained here: it is compiled for GPUs that are not here.
"""

import dataclasses

from rcm_jax.configs import wan_14b_rcm
from rcm_jax.wan.config import WAN_14B_I2V


def get_config():
    config = wan_14b_rcm.get_config()
    config.model.update(dataclasses.asdict(WAN_14B_I2V))
    config.teacher = "wan2.1_i2v_14b_480p.safetensors"
    return config
