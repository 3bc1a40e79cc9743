"""NaN is told where it comes from: weights, latents, frames."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import rcm_jax
from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.load import load_params
from rcm_jax.finite import check_finite
from rcm_jax.model_file import ModelInfo, load_model, save_model
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.worlds.toy.codec import ToyCodec
from tests.convert.tiny import save
from tests.tiny import MODEL, perturbed_params
from tests.wan.tiny import DIT, arrays

INFO = ModelInfo(model=MODEL, kind="student", world="toy", latent_shape=(9, 6, 6))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_one_number_is_enough(dtype, wrong):
    numbers = np.linspace(-6e4, 6e4, 1 << 10).astype(dtype)
    assert check_finite(numbers, "x") is numbers
    numbers[7] = wrong
    with pytest.raises(FloatingPointError, match=r"a place: 1 of 1024 numbers are NaN or infinite"):
        check_finite(numbers.reshape(2, -1).T, "a place")


def spoiled(params, value=np.nan):
    head = params["head"] | {"modulation": params["head"]["modulation"].at[0, 0].set(value)}
    return params | {"head": head}


def test_weights(tmp_path):
    path = save_model(tmp_path / "m.safetensors", spoiled(perturbed_params(MODEL)), INFO)
    for read in (lambda: load_model(path), lambda: rcm_jax.load(path)(num_steps=1, progress="")):
        with pytest.raises(FloatingPointError, match=r"m.safetensors, head/modulation: 1 of 48 numbers"):
            read()
    published = arrays("dit", DIT)
    published["head.modulation"][0, 1, 0] = np.inf
    path = save(tmp_path / "w.safetensors", published, config={"_class_name": "WanModel", "num_heads": 2})
    with pytest.raises(FloatingPointError, match=r"w.safetensors, head/modulation: 1 of"):
        load_params(open_checkpoint(path))


def test_latents_and_frames(monkeypatch):
    pipe = Pipeline.of(spoiled(perturbed_params(MODEL)), INFO)
    with pytest.raises(
        FloatingPointError, match=r"latents of video 0 \('a red circle moving left', seed 3\): 3888 of 3888"
    ):
        pipe(num_steps=1, seed=3, progress="")
    decode = ToyCodec.decode
    monkeypatch.setattr(ToyCodec, "decode", lambda self, x: decode(self, x).at[1].mul(jnp.nan))
    pipe = Pipeline.of(perturbed_params(MODEL), INFO)
    videos = pipe.videos(num_steps=1, num_samples=2, progress="")
    assert next(videos).frames.shape == (9, 24, 24, 3)
    wrong = r"frames of video 1 \('a red circle moving left', seed 0\), decoded from finite latents: 15552 of 15552 "
    with pytest.raises(FloatingPointError, match=wrong):
        next(videos)
    with pytest.raises(FloatingPointError, match=wrong):
        pipe.arrays(num_steps=1, num_samples=2, progress="")


@pytest.mark.slow
def test_a_stream(monkeypatch):
    decode = ToyCodec.decode
    monkeypatch.setattr(ToyCodec, "decode", lambda self, x: decode(self, x).at[1, 0, 0, 0].set(jnp.inf))
    stream = rcm_jax.load("toy_causal").stream(num_steps=1, num_samples=2)
    with pytest.raises(FloatingPointError, match=r"frames of chunk 0: 3 of 3456 numbers are NaN or infinite"):
        next(iter(stream))
