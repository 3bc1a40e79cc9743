"""Self forcing with distribution matching on the built-in world, from a teacher-forced consistency student.

    python -m rcm_jax.train --config=toy_causal_sf_dmd --workdir=runs/toy_causal_sf_dmd \
        --config.teacher=runs/toy_causal_tf_scm/student.safetensors

The built-in bidirectional teacher scores the rollouts.
"""

from rcm_jax.configs import toy_causal_tf_scm


def get_config(pattern: str = "c1-2"):
    config = toy_causal_tf_scm.get_config(pattern)
    config.teacher = "runs/toy_causal_tf_scm/student.safetensors"
    config.score_teacher = "toy"
    config.method.update({"consistency": "", "dmd_scale": 2.5, "tangent_warmup": 0, "student_update_freq": 2})
    config.method.p_D.update({"name": "uniform_shift", "shift": 5.0})
    config.causal.score_guidance = 4.0
    config.optimizer.update({"lr": 4e-4, "lr_fake": 1e-3, "decay_updates": 150})
    config.steps = 300
    return config
