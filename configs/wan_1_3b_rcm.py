"""rCM for Wan2.1-T2V-1.3B at 480p, 77 frames, as published (arXiv 2510.08431).

    python -m rcm_jax.train --config=wan_1_3b_rcm --dry_run --devices=8

For eight GPUs of 80 GB, one video each at a time (docs/planning.md), weights over four of them, as published; on 256,
`--config.microbatches=1` does without cuts. 10,000 updates on 256 videos each are the paper's. Not trained here: the
recipe states the published settings and is compiled for GPUs that are not here.
"""

from rcm_jax.configs import base
from rcm_jax.wan.config import WAN_1_3B


def get_config():
    config = base.from_model(WAN_1_3B, "wan2.1_t2v_1.3b.safetensors")
    config.data.name = "shards"
    config.data.batch_size = 256
    config.data.latent_shape = (20, 60, 104)  # 77 frames of 832 x 480
    config.mesh.fsdp = 4
    config.microbatches = 32
    config.steps = 10_000
    config.log_every = 10
    config.checkpoint_every = 500
    return config
