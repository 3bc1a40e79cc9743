"""Fine-tuning of Wan2.1-T2V-1.3B on own videos by flow matching, all weights: a teacher for what comes after.

    python -m rcm_jax.train --config=wan_1_3b_finetune --workdir=runs/finetune --config.data.path=SHARDS \
        --config.teacher=Wan2.1-T2V-1.3B

For one GPU of 48 GB at 81 frames of 480p, eight videos an update, one at a time: 41.7 GiB by the planner
(docs/lora.md). An update is 9.9 PFLOP: 25 s at 40% of an H100, so 2,000 take 14 hours. Times are drawn as those of the
published causal teachers are. Text is not dropped: the network comes with its unconditional text. Planned, not trained
here.
"""

from rcm_jax.configs import base
from rcm_jax.wan.config import WAN_1_3B


def get_config():
    config = base.from_model(WAN_1_3B, "wan2.1_t2v_1.3b.safetensors")
    config.data.update({"name": "shards", "batch_size": 8, "latent_shape": (21, 60, 104)})
    config.microbatches = 8
    config.method.name = "diffusion"
    config.method.p_G.update({"name": "uniform_shift", "shift": 5.0})
    config.optimizer.update({"lr": 1e-5, "b1": 0.9})
    config.steps = 2000
    config.checkpoint_every = 250
    return config
