"""rcm_jax: few-step video generators by consistency and distribution matching distillation, in JAX.

rcm_jax.load("toy")("a red circle moving left")      a network, ours or anybody's, and what surrounds it: videos
from rcm_jax import DiT, DiTConfig, velocity          the network
from rcm_jax import scm_loss, dcm_loss, dmd_loss       the losses, pure functions
from rcm_jax import sample_few_step, sample_ode        the samplers
from rcm_jax import attention                          the op: jvp, grad and both at once
"""

from rcm_jax.flow import LogNormal, UniformShift, guided, trig_denoiser, trig_velocity
from rcm_jax.kernels.attention import attention
from rcm_jax.losses.consistency import dcm_loss, rf_scm_loss, scm_loss
from rcm_jax.losses.diffusion import flow_matching_loss
from rcm_jax.losses.distribution import critic_loss, dmd_loss
from rcm_jax.model_file import load_model, save_model
from rcm_jax.pipelines.pipeline import Pipeline, load
from rcm_jax.pipelines.video import Video
from rcm_jax.sampling.few_step import sample_few_step, simulate
from rcm_jax.sampling.ode import rcm_times, sample_ode, wan_times
from rcm_jax.training.config import RunConfig
from rcm_jax.training.loop import train
from rcm_jax.training.state import Weights
from rcm_jax.version import version
from rcm_jax.wan.config import WAN_1_3B, WAN_14B, DiTConfig
from rcm_jax.wan.dit import DiT, guided_velocity, velocity

__version__ = version()

__all__ = [
    "WAN_1_3B",
    "WAN_14B",
    "DiT",
    "DiTConfig",
    "LogNormal",
    "Pipeline",
    "RunConfig",
    "UniformShift",
    "Video",
    "Weights",
    "attention",
    "critic_loss",
    "dcm_loss",
    "dmd_loss",
    "flow_matching_loss",
    "guided",
    "guided_velocity",
    "load",
    "load_model",
    "rcm_times",
    "rf_scm_loss",
    "sample_few_step",
    "sample_ode",
    "save_model",
    "scm_loss",
    "simulate",
    "train",
    "trig_denoiser",
    "trig_velocity",
    "velocity",
    "wan_times",
]  # fmt: skip
