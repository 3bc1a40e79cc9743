"""Teacher-forced dCM on the built-in world, for comparison with toy_causal_tf_scm.

    python -m rcm_jax.train --config=toy_causal_tf_dcm --workdir=runs/toy_causal_tf_dcm \
        --config.teacher=runs/toy_causal_tf/teacher.safetensors
"""

from rcm_jax.configs import toy_causal_tf_scm


def get_config(pattern: str = "c1-2"):
    config = toy_causal_tf_scm.get_config(pattern)
    config.method.update({"consistency": "dcm", "dcm_shift": 3.0, "tangent_warmup": 0})
    return config
