"""Teacher-forced sCM on the built-in world: a causal student that samples each chunk in 1 to 4 steps.

    python -m rcm_jax.train --config=toy_causal_tf_scm --workdir=runs/toy_causal_tf_scm \
        --config.teacher=runs/toy_causal_tf/teacher.safetensors
"""

from rcm_jax.configs import toy_causal_tf, toy_rcm


def get_config(pattern: str = "c1-2"):
    config = toy_causal_tf.get_config(pattern)
    config.teacher = "runs/toy_causal_tf/teacher.safetensors"
    config.method.update({"name": "distill", "consistency": "rf_scm", "dmd_scale": 0.0, "tangent_warmup": 100})
    config.method.consistency_scale = 100.0
    config.optimizer.update({"lr": 8e-4, "b1": 0.0, "decay_updates": 500})
    config.optimizer.frozen = toy_rcm.TIME_EMBEDDING
    config.steps = 500
    return config
