"""A quantised cache by its published flags: what they make, what is refused in whose name, and what a video says."""

import dataclasses

import numpy as np
import pytest

import rcm_jax
from rcm_jax.causal.cache import Ring
from rcm_jax.causal.network import CausalDiT
from rcm_jax.causal.quantised import QuantisedRing
from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.model_file import ModelInfo, save_model
from rcm_jax.pipelines.options import SamplingOptions
from rcm_jax.quant import CacheQuant, QuantConfig
from rcm_jax.wan.dit import DiT
from tests.tiny import MODEL, perturbed_params

NETWORK = CausalDiT(DiT(MODEL), ChunkPattern(1, 2), 5, (6, 6), window=3)
INFO = ModelInfo(
    dataclasses.replace(MODEL, remat="none"), "student", "toy", (5, 6, 6), 1600.0,
    causal={"pattern": "c1-2", "steps_per_chunk": [1]},
)  # fmt: skip


def test_flags_make_the_cache():
    asked = SamplingOptions(
        kv_dtype_k="int2", kv_smoothing_k="qvg", kv_granularity_k="token", kv_qvg_clusters=8, kv_dtype_v="int4",
        kv_group_size_v=6, kv_scale_rounding="before",
    )  # fmt: skip
    shared = dict(qvg_clusters=8, scale_rounding="before")
    keys = QuantConfig("int2", smoothing="qvg", granularity="token", **shared)
    values = QuantConfig("int4", group_size=6, granularity="token", **shared)
    assert asked.cache_quant == CacheQuant(keys, values, unrotated=True)
    assert asked.quantised(NETWORK, 1).keeps == QuantisedRing(Ring(3), asked.cache_quant)
    assert not SamplingOptions(kv_dtype_v="fp8").cache_quant.unrotated
    assert SamplingOptions(kv_dtype_v="fp8", kv_pre_rope_keys=True).cache_quant.unrotated


def test_without_them_the_cache_is_as_it_was():
    assert SamplingOptions().quantised(NETWORK, 1) is NETWORK
    assert SamplingOptions(kv_pre_rope_keys=True).quantised(NETWORK, 1) is NETWORK


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (dict(kv_dtype_k="int3"), "--kv_dtype_k=int3 must be one of bf16, fp8, fp4, int8, int4, int2"),
        (dict(kv_smoothing_v="svd"), "--kv_smoothing_v=svd must be one of none, clip"),
        (dict(kv_granularity_k="row"), "--kv_granularity_k=row must be one of auto, token"),
        (dict(kv_clip_percentile=0.0), "--kv_clip_percentile=0.0 must be above 0"),
        (dict(kv_qvg_clusters=0), "--kv_qvg_clusters=0 must be at least 1"),
        (dict(kv_dtype_v="int4", kv_group_size_v=5), "--kv_group_size_v=5 must divide the head width, 12"),
        (dict(kv_dtype_k="int4", kv_smoothing_k="hadamard"), "--kv_smoothing_k=hadamard needs a head width that is a"),
        (dict(kv_dtype_v="int8", kv_granularity_v="tensor"), "--kv_granularity_v=tensor is over all heads, which lie"),
    ],
)
def test_errors_name_the_flag(asked, error):
    with pytest.raises(ArgumentError) as raised:
        SamplingOptions(**asked).quantised(NETWORK, 2)
    assert raised.value.as_flags().startswith(error)


@pytest.mark.long
def test_a_video_from_a_quantised_cache(tmp_path):
    """Another video than from the exact one, though not by much; streamed the same; and the file says so."""
    path = save_model(tmp_path / "causal.safetensors", perturbed_params(MODEL, 3), INFO)
    pipe, few = rcm_jax.load(path), {"kv_dtype_k": "int4", "kv_dtype_v": "int8", "kv_group_size_v": 6}
    (exact,), (video,) = pipe("a red circle moving left"), pipe("a red circle moving left", **few)
    difference = np.abs(video.frames.astype(int) - exact.frames)
    assert difference.max() > 0
    assert difference.mean() < 3
    assert video.about["options"].items() >= few.items()
    streamed = np.concatenate(list(pipe.stream("a red circle moving left", **few)), axis=1)
    np.testing.assert_allclose(streamed[0].astype(int), video.frames, atol=1)
