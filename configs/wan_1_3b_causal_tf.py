"""Teacher forcing of Wan2.1-T2V-1.3B: a causal teacher, as published (arXiv 2606.25473).

    python -m rcm_jax.train --config=wan_1_3b_causal_tf:c3-3 --dry_run --devices=8

Starts from the bidirectional 1.3B. For eight GPUs of 80 GB, one video each at a time, weights over four of them; on
256, `--config.microbatches=1` does without cuts. The part after the colon is a chunk pattern and a step preset (see
`base.wan_1_3b_causal`). Not trained here: the recipe states the published settings and is only compiled.
"""

from rcm_jax.configs import base


def get_config(argument: str = ""):
    config = base.wan_1_3b_causal(argument)
    config.method.name = "diffusion"
    config.method.p_G.update({"name": "uniform_shift", "shift": 5.0})
    config.optimizer.update({"lr": 1e-5, "b1": 0.9})
    config.data.batch_size = 256
    config.mesh.update({"fsdp": 4, "sequence": 1})
    config.microbatches = 32
    config.steps = 30_000
    config.checkpoint_every = 1000
    return config
