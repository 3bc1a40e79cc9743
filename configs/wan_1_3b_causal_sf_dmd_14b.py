"""Self forcing of Wan2.1-T2V-1.3B under scores of the 14B, as published (arXiv 2606.25473).

    python -m rcm_jax.train --config=wan_1_3b_causal_sf_dmd_14b:c3-3 --dry_run --devices=64 --gpu=h100

As wan_1_3b_causal_sf_dmd, but the bidirectional teacher that scores the student's videos, and with it the fake score,
is the 14B. For 64 GPUs of 80 GB, of which four share a video and 32 the weights; on 256, `--config.microbatches=1` does
without cuts. The part after the colon is a chunk pattern and a step preset (see `base.wan_1_3b_causal`). Not trained
here: the recipe states the published settings and is compiled for GPUs that are not here.
"""

import dataclasses

from ml_collections import ConfigDict

from rcm_jax.configs import wan_1_3b_causal_sf_dmd
from rcm_jax.wan.config import WAN_14B


def get_config(argument: str = ""):
    config = wan_1_3b_causal_sf_dmd.get_config(argument)
    config.mesh.fsdp = 8
    config.microbatches = 4
    config.score_teacher = "wan2.1_t2v_14b.safetensors"
    config.score_model = ConfigDict(dataclasses.asdict(WAN_14B))
    return config
