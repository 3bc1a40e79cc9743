"""Diffusion forcing of Wan2.1-T2V-1.3B: a causal teacher, as published (arXiv 2606.25473).

    python -m rcm_jax.train --config=wan_1_3b_causal_df:c3-3 --dry_run --devices=8

Starts from the bidirectional 1.3B, on the GPUs of wan_1_3b_causal_tf. The part after the colon is a chunk pattern and a
step preset (see `base.wan_1_3b_causal`). Not trained here: the recipe states the published settings and is only
compiled.
"""

from rcm_jax.configs import wan_1_3b_causal_tf


def get_config(argument: str = ""):
    config = wan_1_3b_causal_tf.get_config(argument)
    config.causal.forcing = "df"
    return config
