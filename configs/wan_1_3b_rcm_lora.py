"""TODO"""

from rcm_jax.configs import wan_1_3b_rcm


def get_config():
    config = wan_1_3b_rcm.get_config()
    config.lora.rank = 32
    config.model.remat = "block"
    config.optimizer.update({"lr": 5e-5, "lr_fake": 1e-5})
    config.data.batch_size = 16
    config.mesh.fsdp = 1
    config.microbatches = 16
    config.checkpoint_every = 250
    return config
