"""rCM for Wan2.1-T2V-1.3B by a LoRA of rank 32: student and fake score beside one bfloat16 copy of the teacher.

    python -m rcm_jax.train --config=wan_1_3b_rcm_lora --workdir=runs/rcm --config.data.path=SHARDS \
        --config.teacher=Wan2.1-T2V-1.3B

For one GPU of 24 GB at 77 frames of 480p, one video at a time: 12.8 GiB by the planner (docs/lora.md). On eight videos
an update with both losses is 34 PFLOP at the least, a critic's 13: 85 s and 33 s at 40% of an H100, more where the
student's sampler has more than one step. Batch, rates and steps are ours: what is published trains whole networks on
256 videos an update. Leaves student_lora.safetensors, 175 MB; checkpoints take 0.9 GB. Planned, not trained here.
"""

from rcm_jax.configs import wan_1_3b_rcm


def get_config():
    config = wan_1_3b_rcm.get_config()
    config.lora.rank = 32
    config.optimizer.update({"lr": 5e-5, "lr_fake": 1e-5})
    config.method.tangent_warmup = 200
    config.data.batch_size = 8
    config.mesh.fsdp = 1
    config.microbatches = 8
    config.steps = 2000
    config.checkpoint_every = 250
    return config
