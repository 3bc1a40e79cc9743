"""The built-in world's teacher, first part: flow matching from random weights, one time a video.

    python -m rcm_jax.train --config=toy_teacher_start --workdir=runs/toy_teacher_start

2 CPU cores: 0.26 s a step, 26 minutes. After it colour, shape and axis of motion follow the text; which of the two ways
along the axis does not. `toy_teacher.py` continues.
"""

from rcm_jax.configs import base
from rcm_jax.wan.config import DiTConfig

MODEL = DiTConfig(
    dim=128, ffn_dim=512, num_heads=4, num_layers=4, in_channels=12, out_channels=12, freq_dim=128,
    text_dim=64, text_len=8, remat="none", unroll=4,
)  # fmt: skip


def get_config():
    config = base.from_model(MODEL, "none")
    config.teacher = ""
    config.data.batch_size = 32
    config.data.latent_shape = (9, 6, 6)
    config.method.name = "diffusion"
    config.method.guidance = 4.0
    config.diffusion.text_dropout = 0.1
    config.method.p_G.name = "uniform_shift"
    config.method.p_G.shift = 3.0
    config.optimizer.update({"lr": 2e-3, "b1": 0.9, "b2": 0.99, "decay_updates": 6000})
    config.steps = 6000
    return config
