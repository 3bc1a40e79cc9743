"""Teacher-forced sCM for Wan2.1-T2V-1.3B, as published (arXiv 2606.25473).

    python -m rcm_jax.train --config=wan_1_3b_causal_tf_scm:c3-3 --dry_run --devices=8

The teacher is the causal 1.3B of wan_1_3b_causal_tf; the published one was a causal 14B, which
wan_1_3b_causal_tf_scm_14b takes. For eight GPUs of 80 GB, of which four share a video. The part after the colon is a
chunk pattern and a step preset (see `base.wan_1_3b_causal`). Not trained here: the recipe states the published settings
and is only compiled.
"""

from rcm_jax.configs import base


def get_config(argument: str = ""):
    config = base.wan_1_3b_causal(argument)
    config.teacher = "wan_1_3b_causal_tf/teacher.safetensors"
    config.data.batch_size = 32
    config.microbatches = 16
    config.steps = 1000
    config.method.update({"consistency": "rf_scm", "dmd_scale": 0.0, "tangent_warmup": 1000})
    config.method.p_G.update({"name": "lognormal", "mean": -0.8, "std": 1.6})
    return config
