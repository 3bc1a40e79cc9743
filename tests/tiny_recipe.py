"""A recipe of a tiny network on the built-in world, for commands: --config=tests/tiny_recipe.py:TEACHER_FILE"""

from rcm_jax.configs import base
from tests.tiny import tiny_run


def get_config(teacher: str):
    config = base.from_model(tiny_run().model, teacher)
    config.update(tiny_run(teacher=teacher, steps=12, log_every=3, checkpoint_every=4).to_dict())
    return config
