"""sCM alone on the built-in world: the continuous-time consistency loss, no fake score.

    python -m rcm_jax.train --config=toy_scm --workdir=runs/toy_scm

As many network passes as toy_rcm makes: 8200 (see there for how they are counted).
"""

from rcm_jax.configs import toy_rcm


def get_config():
    config = toy_rcm.get_config()
    config.method.dmd_scale = 0.0
    config.steps = config.optimizer.decay_updates = 1367
    return config
