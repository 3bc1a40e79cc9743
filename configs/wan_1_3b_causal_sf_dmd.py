"""Self forcing with distribution matching for Wan2.1-T2V-1.3B, as published (arXiv 2606.25473).

    python -m rcm_jax.train --config=wan_1_3b_causal_sf_dmd:c3-3 --dry_run --devices=8

Starts from a consistency student and is scored by the bidirectional 1.3B; the published scores are the 14B's, which
wan_1_3b_causal_sf_dmd_14b takes. For eight GPUs of 80 GB, of which four share a video. The part after the colon is a
chunk pattern and a step preset (see `base.wan_1_3b_causal`); by them goes how long it trains. Not trained here: the
recipe states the published settings and is only compiled.
"""

from rcm_jax.configs import base

STEPS = {"4step": (1200, 1250), "2step": (3000, 2500), "2step_noisy_ctx": (1500, 1750), "1step": (3000, 3000)}


def get_config(argument: str = ""):
    config = base.wan_1_3b_causal(argument)
    config.teacher = "wan_1_3b_causal_tf_scm/student.safetensors"
    config.score_teacher = "wan2.1_t2v_1.3b.safetensors"
    preset = next((word for word in argument.split(",") if word in STEPS), "4step")
    frame_wise, chunk_wise = STEPS[preset]
    config.steps = frame_wise if config.causal.pattern.endswith("-1") else chunk_wise
    config.checkpoint_every = 50
    config.method.update({"consistency": "", "tangent_warmup": 0, "student_update_freq": 6})
    return config
