"""dCM alone on the built-in world: consistency over 48 discrete steps, no derivative.

    python -m rcm_jax.train --config=configs/toy_dcm.py --workdir=runs/toy_dcm

The number of steps is such that all toy students make as many network passes (see docs/results.md).
"""

from rcm_jax.configs import toy_rcm


def get_config():
    config = toy_rcm.get_config()
    config.method.consistency = "dcm"
    config.method.dmd_scale = 0.0
    return config
