"""TODO"""

from rcm_jax.configs import base
from rcm_jax.wan.config import WAN_1_3B


def get_config():
    config = base.from_model(WAN_1_3B, "wan2.1_t2v_1.3b.safetensors")
    config.data.update({"name": "shards", "batch_size": 8, "latent_shape": (21, 60, 104)})
    config.microbatches = 8
    config.model.remat = "block"
    config.method.name = "diffusion"
    config.method.p_G.update({"name": "uniform_shift", "shift": 5.0})
    config.optimizer.update({"lr": 1e-5, "b1": 0.9})
    config.steps = 2000
    config.checkpoint_every = 250
    return config
