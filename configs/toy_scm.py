"""sCM alone on the built-in world: the continuous-time consistency loss, no fake score.

    python -m rcm_jax.train --config=configs/toy_scm.py --workdir=runs/toy_scm

The number of steps is such that all toy students make as many network passes (see docs/results.md).
"""

from rcm_jax.configs import toy_rcm


def get_config():
    config = toy_rcm.get_config()
    config.method.dmd_scale = 0.0
    return config
