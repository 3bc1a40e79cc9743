"""Fine-tuning of Wan2.1-T2V-1.3B on own videos by a LoRA of rank 32.

    python -m rcm_jax.train --config=wan_1_3b_finetune_lora --workdir=runs/finetune --config.data.path=SHARDS \
        --config.teacher=Wan2.1-T2V-1.3B

For one GPU of 24 GB at 81 frames of 480p, one video at a time: 12.6 GiB by the planner (docs/lora.md). An update on
eight videos is 9.1 PFLOP: 23 s at 40% of an H100, 140 s of an RTX 4090. Leaves teacher_lora.safetensors, 175 MB, which
diffusers reads as it is; checkpoints take 0.7 GB. Planned, not trained here.
"""

from rcm_jax.configs import wan_1_3b_finetune


def get_config():
    config = wan_1_3b_finetune.get_config()
    config.lora.rank = 32
    config.optimizer.lr = 1e-4
    return config
