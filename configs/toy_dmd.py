"""DMD alone on the built-in world: distribution matching without a consistency loss.

    python -m rcm_jax.train --config=toy_dmd --workdir=runs/toy_dmd

As many network passes as toy_rcm makes: 8200 (see there for how they are counted).
"""

from rcm_jax.configs import toy_rcm


def get_config():
    config = toy_rcm.get_config()
    config.method.consistency = ""
    config.method.tangent_warmup = 0
    config.steps = 1262
    config.optimizer.decay_updates = 631
    return config
