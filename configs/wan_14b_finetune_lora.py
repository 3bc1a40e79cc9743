"""Fine-tuning of Wan2.1-T2V-14B on own videos by a LoRA of rank 32.

    python -m rcm_jax.train --config=wan_14b_finetune_lora --workdir=runs/finetune --config.data.path=SHARDS \
        --config.teacher=Wan2.1-T2V-14B

For one GPU of 80 GB at 81 frames of 480p, one video at a time: 64.5 GiB by the planner (docs/lora.md, also for 48 GB).
An update on eight videos is 50 PFLOP: two minutes at 40% of an H100, so 1,000 take 35 hours. Leaves
teacher_lora.safetensors, 0.6 GB; checkpoints take 2.5 GB. Planned, not trained here.
"""

import dataclasses

from rcm_jax.configs import wan_1_3b_finetune_lora
from rcm_jax.wan.config import WAN_14B


def get_config():
    config = wan_1_3b_finetune_lora.get_config()
    config.model.update(dataclasses.asdict(WAN_14B))
    config.teacher = "wan2.1_t2v_14b.safetensors"
    config.steps = 1000
    return config
