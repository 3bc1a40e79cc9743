"""TODO"""

from rcm_jax.configs import wan_14b_rcm


def get_config():
    config = wan_14b_rcm.get_config()
    config.lora.rank = 32
    config.model.remat = "block"
    config.optimizer.update({"lr": 5e-5, "lr_fake": 5e-6})
    config.data.batch_size = 16
    config.mesh.update({"fsdp": 1, "sequence": 1})
    config.microbatches = 16
    return config
