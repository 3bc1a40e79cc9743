"""The autoencoder's 3-D convolution in both of its forms, which of them is compiled for what; what goes past levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.kernels.target import Target
from rcm_jax.wan import vae_layers
from rcm_jax.wan.vae_layers import averaged, convolve, from_patches, planes, repeated, solid, to_patches


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


def test_what_goes_past_a_level_is_of_whole_blocks():
    """Blocks of two frames, rows and columns: means of each channel's numbers, and as many copies of them."""
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 6, 3)).astype(np.float32)
    means = averaged(x, 3, time=2, space=2)
    assert means.shape == (1, 2, 2, 3, 3)
    np.testing.assert_allclose(means[0, 1, 0, 1], x[0, 2:, :2, 2:4].mean((0, 1, 2)), atol=1e-6)
    alone = averaged(x[:, 3:], 3, time=2, space=2)  # a first frame, after a zero
    np.testing.assert_allclose(alone[0, 0, 0, 1], x[0, 3, :2, 2:4].mean((0, 1)) / 2, atol=1e-6)
    copies = repeated(x, 3, time=2, space=2, first=False)
    np.testing.assert_array_equal(copies, x.repeat(2, 1).repeat(2, 2).repeat(2, 3))
    np.testing.assert_array_equal(repeated(x[:, :1], 3, time=2, space=2, first=True), copies[:, 1:2])
    np.testing.assert_array_equal(repeated(averaged(x, 24, time=2, space=2), 3, time=2, space=2, first=False), x)
    with pytest.raises(ValueError, match="a shortcut cannot average 24 numbers to 5 features"):
        averaged(x, 5, time=2, space=2)
    with pytest.raises(ValueError, match="a shortcut cannot make 4 numbers of 3"):
        repeated(x, 1, time=1, space=2, first=False)


def test_a_patch_is_colours_then_columns_then_rows():
    x = jnp.arange(2 * 4 * 2).reshape(1, 1, 4, 2, 2)
    patches = to_patches(x, 2)
    assert patches.shape == (1, 1, 2, 1, 8)
    np.testing.assert_array_equal(patches[0, 0, 0, 0], [0, 4, 2, 6, 1, 5, 3, 7])
    np.testing.assert_array_equal(from_patches(patches, 2), x)
