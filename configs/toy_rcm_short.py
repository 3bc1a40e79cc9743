"""rCM on the built-in world in under half of toy_rcm's steps: what `make demo` trains.

    python -m rcm_jax.train --config=toy_rcm_short --workdir=runs/toy_rcm_short

200 student and 200 critic steps, at a higher rate and with more weight on the distribution matching; no warm-up of the
tangent, whose own program would take as long to compile as thirty of these steps. docs/results.md has the scores of
three seeds beside toy_rcm's.
"""

from rcm_jax.configs import toy_rcm


def get_config():
    config = toy_rcm.get_config()
    config.method.update({"dmd_scale": 3.0, "tangent_warmup": 0})
    config.optimizer.update({"lr": 1.3e-3, "warmup_updates": 30, "decay_updates": 210})
    config.steps = 400
    config.checkpoint_every = 200
    return config
