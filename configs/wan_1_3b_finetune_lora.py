"""TODO"""

from rcm_jax.configs import wan_1_3b_finetune


def get_config():
    config = wan_1_3b_finetune.get_config()
    config.lora.rank = 32
    config.optimizer.lr = 1e-4
    return config
