"""A run small enough to compile and train within a test."""

import dataclasses
import functools
from typing import ClassVar

import jax
import numpy as np

from rcm_jax.data.batch import Batch
from rcm_jax.data.config import DataConfig
from rcm_jax.objectives.config import MethodConfig
from rcm_jax.training.config import MeshConfig, OptimizerConfig, RunConfig
from rcm_jax.types import Params
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.networks import abstract_params

MODEL = DiTConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_channels=12, out_channels=12, freq_dim=16, text_dim=64,
    text_len=8,
)  # fmt: skip


def tiny_run(
    *, method: dict | None = None, optimizer: dict | None = None, mesh: dict | None = None, **changes
) -> RunConfig:
    """An rCM run on the toy world with a short warm-up and cycle, changed where asked."""
    base = RunConfig(
        model=MODEL,
        teacher="given",
        method=MethodConfig(**{"tangent_warmup": 2, "student_update_freq": 3, "guidance": 3.0} | (method or {})),
        optimizer=OptimizerConfig(**{"lr": 1e-3, "lr_fake": 1e-3, "warmup_updates": 2} | (optimizer or {})),
        data=DataConfig(batch_size=8, latent_shape=(9, 6, 6)),
        mesh=MeshConfig(**(mesh or {})),
        steps=7,
        log_every=2,
        checkpoint_every=100,
        tensorboard=False,
    )
    return dataclasses.replace(base, **changes)


@functools.cache
def perturbed_params(config: DiTConfig, seed: int = 0, scale: float = 0.05) -> Params:
    """Weights as large as initial ones, plus noise on every leaf: the zeros of a fresh network would hide errors.
    NumPy draws them, since a program that does takes seconds to compile for every shape of a network."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        layer, name = jax.tree_util.keystr(path[:-1]), path[-1].key
        noise = scale * rng.normal(size=leaf.shape)
        if name == "scale":
            noise += 1
        elif name in ("kernel", "modulation"):
            small = any(part in layer for part in ("text_", "time_in", "time_out"))
            noise += (0.02 if small else config.dim**-0.5) * rng.normal(size=leaf.shape)
        return noise.astype(leaf.dtype)

    with jax.ensure_compile_time_eval():  # the first call may be under jit
        return jax.tree.map(jax.device_put, jax.tree_util.tree_map_with_path(draw, abstract_params(config)))


IMAGE_TOKENS = 5


class RandomSource:
    """Batches of noise: what a step computes does not depend on what the data mean."""

    about: ClassVar = {}

    def __init__(self, config: RunConfig):
        self.config = config
        self.null_text = np.zeros((config.model.text_len, config.model.text_dim), np.float32)

    def keys(self, step: int) -> list[str]:
        return [f"noise {step}.{i}" for i in range(self.config.data.batch_size)]

    def batch(self, step: int, rows: range | None = None) -> Batch:
        rng = np.random.default_rng((self.config.seed, step))
        B, model = self.config.data.batch_size, self.config.model
        shape = self.config.data.latent_shape

        def normal(*size: int) -> np.ndarray:
            return rng.normal(size=(B, *size)).astype(np.float32)

        latents, text = normal(*shape, model.out_channels), normal(model.text_len, model.text_dim)
        channels = model.in_channels - model.out_channels
        batch = Batch(
            latents,
            text,
            condition=normal(*shape, channels) if channels else None,
            image=normal(IMAGE_TOKENS, model.image_dim) if model.image_dim else None,
        )
        rows = rows or range(B)
        return jax.tree.map(lambda x: x[rows.start : rows.stop], batch)
