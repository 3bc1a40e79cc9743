"""The autoencoder's 3-D convolution in both of its forms, and which of them is compiled for what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.kernels.target import Target
from rcm_jax.wan import vae_layers
from rcm_jax.wan.vae_layers import convolve, planes, solid


@pytest.mark.parametrize(
    ("size", "stride", "frames"), [((3, 3, 3), 1, 6), ((3, 3, 3), 1, 3), ((3, 1, 1), 1, 4), ((3, 1, 1), 2, 5)]
)
def test_both_forms_are_one_convolution(size, stride, frames):
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((2, frames, 5, 6, 4), (*size, 4, 3)))
    got, want = solid(x, kernel, stride), planes(x, kernel, stride)
    assert got.shape == (2, (frames - size[0]) // stride + 1, 5, 6, 3)
    np.testing.assert_allclose(got, want, atol=2e-5)
    row = sum(x[1, f, 2, 3] @ kernel[f, size[1] // 2, size[2] // 2] for f in range(3))  # the middle of the first frame
    if size[1:] == (1, 1):
        np.testing.assert_allclose(got[1, 0, 2, 3], row, atol=1e-5)


@pytest.mark.parametrize(("place", "dimensions"), [(Target("a GPU", 9.0), [5]), (Target("a CPU", None), [4, 4, 4])])
def test_the_device_chooses_the_form(monkeypatch, place, dimensions):
    monkeypatch.setattr(vae_layers, "target", lambda: place)
    shapes = jnp.zeros((1, 4, 2, 2, 3)), jnp.zeros((3, 3, 3, 3, 2))
    found = [
        e for e in jax.make_jaxpr(lambda *x: convolve(*x))(*shapes).eqns if e.primitive.name == "conv_general_dilated"
    ]
    assert [e.outvars[0].aval.ndim for e in found] == dimensions
