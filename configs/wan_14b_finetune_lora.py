"""TODO"""

import dataclasses

from rcm_jax.configs import wan_1_3b_finetune_lora
from rcm_jax.wan.config import WAN_14B


def get_config():
    config = wan_1_3b_finetune_lora.get_config()
    config.model.update(dataclasses.asdict(WAN_14B) | {"remat": "block"})
    config.teacher = "wan2.1_t2v_14b.safetensors"
    return config
