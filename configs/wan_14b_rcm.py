"""rCM for Wan2.1-T2V-14B at 480p, 81 frames, as published (arXiv 2510.08431).

    python -m rcm_jax.train --config=wan_14b_rcm --dry_run --devices=64

For 64 GPUs of 80 GB (docs/planning.md): eight share a video, 32 the weights, as published; on 512 GPUs
`--config.microbatches=1` does without cuts. 10,000 updates on 64 videos each are the paper's. Not trained here: the
recipe states the published settings and is compiled for GPUs that are not here.
"""

import dataclasses

from rcm_jax.configs import wan_1_3b_rcm
from rcm_jax.wan.config import WAN_14B


def get_config():
    config = wan_1_3b_rcm.get_config()
    config.model.update(dataclasses.asdict(WAN_14B))
    config.teacher = "wan2.1_t2v_14b.safetensors"
    config.data.latent_shape = (21, 60, 104)  # 81 frames of 832 x 480
    config.optimizer.update({"lr": 1e-6, "lr_fake": 1e-7})
    config.method.p_G.mean = 1.5
    config.method.student_update_freq = 10
    config.method.tangent_warmup = 0
    config.sigma_max = 200.0
    config.data.batch_size = 64
    config.mesh.update({"fsdp": 4, "sequence": 8})
    config.microbatches = 8
    config.checkpoint_every = 250
    return config
