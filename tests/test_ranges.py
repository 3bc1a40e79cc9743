"""Numbers that are not possible are refused where they are declared."""

import math

import numpy as np
import pytest

from rcm_jax.data.config import DataConfig
from rcm_jax.objectives.config import CausalConfig, MethodConfig, TimeSamplerConfig
from rcm_jax.pipelines.options import FileOptions, SamplingOptions
from rcm_jax.ranges import FINITE, POSITIVE, Range, at_least, between
from rcm_jax.training.config import MeshConfig, OptimizerConfig, RunConfig
from rcm_jax.wan.config import WAN_1_3B


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "words"),
    [
        (at_least(1), [1, 1e30], [0, -1, math.nan, math.inf], "at least 1"),
        (between(0, 1), [0, 0.5, 1], [-1e-9, 1.1, math.nan], "at least 0 and at most 1"),
        (POSITIVE, [1e-30, 5], [0, -1, math.nan, math.inf], "above 0"),
        (Range(0, open=True, infinite=True), [1, math.inf], [0, math.nan], "above 0"),
        (FINITE, [-1e30, 0], [math.nan, math.inf, -math.inf], "a finite number"),
        (between(0, 2**32 - 1), [0, 2**32 - 1], [2**32], "at least 0 and at most 4294967295"),
    ],
)
def test_a_range_says_what_is_inside(allowed, inside, outside, words):
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert str(allowed) == words


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SamplingOptions(guidance_scale=math.nan), "guidance_scale=nan must be at least 0"),
        (lambda: SamplingOptions(shift=math.inf), "shift=inf must be above 0"),
        (lambda: SamplingOptions(steps_per_chunk=[4, 0]), r"steps_per_chunk=\[4, 0\] must be at least 1"),
        (lambda: SamplingOptions(seed=2**32), "seed=4294967296 must be at least 0 and at most 4294967295"),
        (lambda: SamplingOptions(num_samples=np.int64(0)), "num_samples=0 must be at least 1"),
        (lambda: SamplingOptions(window=-1), "window=-1 must be at least 0"),
        (lambda: FileOptions(boundary=math.nan), "boundary=nan must be at least 0 and at most 1"),
        (lambda: FileOptions(fsdp=0), "fsdp=0 must be at least 1"),
        (lambda: FileOptions(num_heads=0), "num_heads=0 must be at least 1"),
        (lambda: RunConfig(model=WAN_1_3B, teacher="t", steps=0), "steps=0 must be at least 1"),
        (lambda: RunConfig(model=WAN_1_3B, teacher="t", seed=-1), "seed=-1 must be at least 0"),
        (lambda: RunConfig(model=WAN_1_3B, teacher="t", sigma_max=math.nan), "sigma_max=nan must be above 0"),
        (lambda: OptimizerConfig(lr=math.nan), "optimizer.lr=nan must be above 0"),
        (lambda: OptimizerConfig(b2=1.0), "optimizer.b2=1.0 must be at least 0 and at most"),
        (lambda: MeshConfig(data=0), "mesh.data=0 must be at least 1"),
        (lambda: DataConfig(batch_size=0), "data.batch_size=0 must be at least 1"),
        (lambda: MethodConfig(dmd_scale=math.nan), "method.dmd_scale=nan must be at least 0"),
        (
            lambda: MethodConfig(max_simulation_steps=5),
            "method.max_simulation_steps=5 must be at least 1 and at most 4",
        ),
        (lambda: CausalConfig(sink=-1), "causal.sink=-1 must be at least 0"),
        (lambda: TimeSamplerConfig(std=0.0), "std=0.0 must be above 0"),
    ],
)
def test_what_is_declared_is_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()
