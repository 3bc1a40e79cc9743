"""rCM for Wan2.1-T2V-14B by a LoRA of rank 32: student and fake score beside one bfloat16 copy of the teacher.

    python -m rcm_jax.train --config=wan_14b_rcm_lora --workdir=runs/rcm --config.data.path=SHARDS \
        --config.teacher=Wan2.1-T2V-14B

For one GPU of 80 GB at 81 frames of 480p, one video at a time: 66.0 GiB by the planner (docs/lora.md). On eight videos
an update with both losses is 205 PFLOP at the least, a critic's 78: nine and more than three minutes at 40% of an
H100. A host of eight takes one video each: `--config.mesh.fsdp=8 --config.microbatches=1`. Batch, rates and steps are
ours. Leaves student_lora.safetensors, 0.6 GB; checkpoints take 3.1 GB. Planned, not trained here.
"""

from rcm_jax.configs import wan_14b_rcm


def get_config():
    config = wan_14b_rcm.get_config()
    config.lora.rank = 32
    config.optimizer.update({"lr": 5e-5, "lr_fake": 5e-6})
    config.data.batch_size = 8
    config.mesh.update({"fsdp": 1, "sequence": 1})
    config.microbatches = 8
    config.steps = 1000
    return config
