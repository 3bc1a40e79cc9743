"""Teacher-forced dCM of Wan2.1-T2V-1.3B from a causal 14B, as published (arXiv 2606.25473).

    python -m rcm_jax.train --config=wan_1_3b_causal_tf_dcm_14b:c3-3 --dry_run --devices=32 --gpu=h100

As wan_1_3b_causal_tf_dcm, but the teacher is the causal 14B of wan_14b_causal_tf, and the student starts from the
causal 1.3B. For 32 GPUs of 80 GB, of which four share a video and all the weights; on 128, `--config.microbatches=1`
does without cuts. Not trained here: the recipe states the published settings and is only compiled.
"""

from rcm_jax.configs import base, wan_1_3b_causal_tf_dcm


def get_config(argument: str = ""):
    return base.from_14b(wan_1_3b_causal_tf_dcm.get_config(argument))
