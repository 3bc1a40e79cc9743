"""rCM on the built-in world: sCM and distribution matching together, from the built-in teacher.

python -m rcm_jax.train --config=configs/toy_rcm.py --workdir=runs/toy_rcm
"""

from rcm_jax.configs import base, toy_teacher_start


def get_config():
    config = base.from_model(toy_teacher_start.MODEL, "toy")
    config.data.batch_size = 16
    config.data.latent_shape = (9, 6, 6)
    config.method.guidance = 4.0
    config.method.tangent_warmup = 100
    config.optimizer.update({"lr": 2e-4, "lr_fake": 2e-4, "b2": 0.99, "warmup_updates": 50})
    config.steps = 1300
    config.checkpoint_every = 500
    return config
