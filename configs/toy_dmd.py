"""DMD alone on the built-in world: distribution matching without a consistency loss.

    python -m rcm_jax.train --config=configs/toy_dmd.py --workdir=runs/toy_dmd

The number of steps is such that all toy students make as many network passes (see docs/results.md).
"""

from rcm_jax.configs import toy_rcm


def get_config():
    config = toy_rcm.get_config()
    config.method.consistency = ""
    config.method.tangent_warmup = 0
    return config
