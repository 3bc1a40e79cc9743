"""rCM for Wan2.2-I2V-A14B's expert for high noise, at 480p, 81 frames (docs/i2v.md).

    python -m rcm_jax.train --config=wan22_i2v_high_rcm --dry_run --devices=64

Trained on the times from the boundary up alone; wan22_i2v_low_rcm is the other half. For 64 GPUs of 80 GB, as
wan_14b_rcm: eight share a video, 32 the weights; 22.0 GiB of a GPU at most (docs/planning.md). Nothing is published of
its training, and it was not trained here: it is compiled for GPUs that are not here.
"""

import dataclasses

from rcm_jax.configs import wan_14b_rcm
from rcm_jax.wan.config import WAN22_A14B_I2V, WAN22_BOUNDARY


def get_config():
    config = wan_14b_rcm.get_config()
    config.model.update(dataclasses.asdict(WAN22_A14B_I2V))
    config.teacher = "wan2.2_i2v_a14b_high_noise.safetensors"
    config.method.guidance = 3.5  # of Wan2.2's own sampler
    config.method.t_range = (WAN22_BOUNDARY["i2v"], 1.0)
    config.method.max_simulation_steps = 2  # the four-step sampler's on this side
    return config
