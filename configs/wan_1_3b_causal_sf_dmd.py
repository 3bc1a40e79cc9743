"""Self forcing with distribution matching for Wan2.1-T2V-1.3B, as published (arXiv 2606.25473).

    python -m rcm_jax.train --config=wan_1_3b_causal_sf_dmd:c3-3 --dry_run --devices=8

Starts from a consistency student and is scored by the bidirectional teacher. The part after the colon is a chunk
pattern and a step preset (see `base.wan_1_3b_causal`). Not trained here: the recipe states the published settings and
is only compiled.
"""

from rcm_jax.configs import base


def get_config(argument: str = ""):
    config = base.wan_1_3b_causal(argument)
    config.teacher = "wan_1_3b_causal_tf_scm/student.safetensors"
    config.score_teacher = "wan2.1_t2v_1.3b.safetensors"
    config.method.update({"consistency": "", "tangent_warmup": 0, "student_update_freq": 6})
    return config
