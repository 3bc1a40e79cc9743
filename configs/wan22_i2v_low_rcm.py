"""rCM for Wan2.2-I2V-A14B's expert for low noise, at 480p, 81 frames (docs/i2v.md).

    python -m rcm_jax.train --config=wan22_i2v_low_rcm --dry_run --devices=64

Trained on the times below the boundary alone, its own videos begun with the data's; the other half is
wan22_i2v_high_rcm. For 64 GPUs of 80 GB, as wan_14b_rcm: eight share a video, 32 the weights; 22.0 GiB of a GPU at most
(docs/planning.md). Nothing is published of its training, and it was not trained here: it is compiled for GPUs that are
not here.
"""

from rcm_jax.configs import wan22_i2v_high_rcm
from rcm_jax.wan.config import WAN22_BOUNDARY


def get_config():
    config = wan22_i2v_high_rcm.get_config()
    config.teacher = "wan2.2_i2v_a14b_low_noise.safetensors"
    config.method.t_range = (0.0, WAN22_BOUNDARY["i2v"])
    return config
