"""Diffusion forcing of Wan2.1-T2V-14B: a causal teacher, as published (arXiv 2606.25473).

    python -m rcm_jax.train --config=wan_14b_causal_df:c3-3 --dry_run --devices=64 --gpu=h100

Starts from the bidirectional 14B. For 64 GPUs of 80 GB, of which eight share a video and 32 the weights; on 512,
`--config.microbatches=1` does without cuts. The part after the colon is a chunk pattern and a step preset (see
`base.wan_1_3b_causal`). Not trained here: the recipe states the published settings and is only compiled.
"""

from rcm_jax.configs import base, wan_1_3b_causal_df


def get_config(argument: str = ""):
    return base.on_14b(wan_1_3b_causal_df.get_config(argument))
