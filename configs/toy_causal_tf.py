"""Teacher forcing on the built-in world: a causal teacher, from the built-in bidirectional one.

    python -m rcm_jax.train --config=toy_causal_tf --workdir=runs/toy_causal_tf

The part after a colon is a chunk pattern for 9 latent frames (c1-2): --config=toy_causal_tf:c1-1.
"""

from rcm_jax.configs import base, toy_teacher_start


def get_config(pattern: str = "c1-2"):
    config = base.from_model(toy_teacher_start.MODEL, "toy")
    config.causal.pattern = pattern
    config.data.batch_size = 16
    config.data.latent_shape = (9, 6, 6)
    config.method.update({"name": "diffusion", "guidance": 3.0, "consistency_scale": 1.0})
    config.diffusion.text_dropout = 0.1
    config.method.p_G.update({"name": "uniform_shift", "shift": 3.0})
    config.optimizer.update({"lr": 1e-3, "b1": 0.9, "b2": 0.99, "warmup_updates": 50, "decay_updates": 800})
    config.sigma_max = 1600.0
    config.steps = 800
    config.checkpoint_every = 400
    return config
