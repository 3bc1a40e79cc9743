"""Codes, float8 and packing: exact inverses, ties, and the errors that each width allows."""

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rcm_jax.quant import codes

EAGER = hypothesis.settings(deadline=None, max_examples=15)
GRID = {  # every value a group's numbers can come back as, in units of the scale
    "int8": np.arange(-127, 128),
    "int4": np.arange(-7, 8),
    "int2": np.array(codes.INT2),
    "fp4": np.array(codes.FP4),
    "fp8": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
}
# half the widest gap between neighbours of the grid, as a share of the greatest
GAP = {"int8": 0.5 / 127, "int4": 0.5 / 7, "int2": 0.5 / 1.5, "fp4": 1 / 6, "fp8": 16 / 448}


@hypothesis.given(st.sampled_from([2, 4]), st.data())
@EAGER
def test_packing_has_an_inverse(bits, data):
    """Any codes of any count; and the first code lies in the lowest bits."""
    given = data.draw(hnp.arrays(np.uint8, st.integers(1, 13), elements=st.integers(0, 2**bits - 1)))
    packed = codes.pack(jnp.asarray(given), bits)
    assert packed.nbytes == -(-given.size * bits // 8)
    assert int(packed[0]) & (2**bits - 1) == given[0]
    np.testing.assert_array_equal(codes.unpack(packed, bits, given.shape), given)


def test_float8_rounds_once():
    """As ml_dtypes does, about every number of float8 and every half between two, up to its greatest; then it stays."""
    grid = np.sort(GRID["fp8"][np.isfinite(GRID["fp8"])])
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32)
    x = np.concatenate([points, np.nextafter(points, np.float32(1e9)), np.nextafter(points, np.float32(-1e9))])
    got, inside = jax.jit(codes.to_float8)(x), np.abs(x) <= 448
    np.testing.assert_array_equal(
        np.asarray(got).astype(np.float32)[inside], x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)[inside]
    )
    beyond = codes.to_float8(jnp.array([1e4, -1e4, 2.0**-10, 1.1 * 2.0**-10], jnp.float32))
    np.testing.assert_array_equal(np.asarray(beyond).astype(np.float32), [448, -448, 0, 2.0**-9])


def test_a_program_that_restores_what_it_stored_rounds_too():
    """A compiler that may keep excess precision must not skip the rounding between two casts."""
    x = jnp.linspace(0.1, 1.0, 16, dtype=jnp.float32)
    for rounded, dtype in ((codes.to_float8, ml_dtypes.float8_e4m3fn), (codes.to_bfloat16, ml_dtypes.bfloat16)):
        once = jax.jit(lambda x, rounded=rounded: rounded(x).astype(jnp.float32))(x)
        np.testing.assert_array_equal(once, np.asarray(x).astype(dtype).astype(np.float32))


@pytest.mark.parametrize("dtype", GRID)
def test_numbers_of_the_grid_come_back(dtype):
    """With their greatest at the grid's end, the scale is 1 and nothing is lost."""
    grid = GRID[dtype][np.isfinite(GRID[dtype])].astype(np.float32).reshape(1, 1, -1)
    scale = codes.scale_of(jnp.asarray(grid), dtype)
    np.testing.assert_array_equal(scale, [[[1.0]]])
    np.testing.assert_array_equal(codes.decode(codes.encode(grid, scale, dtype), dtype), grid)


@pytest.mark.parametrize("dtype", GRID)
def test_an_error_is_at_most_half_a_step(dtype):
    x = np.random.default_rng(0).standard_normal((3, 4, 32)).astype(np.float32)
    scale = codes.scale_of(jnp.asarray(x), dtype)
    back = codes.decode(codes.encode(jnp.asarray(x), scale, dtype), dtype) * scale
    allowed = GAP[dtype] * np.abs(x).max(axis=-1, keepdims=True)
    assert (np.abs(back - x) <= allowed * (1 + 1e-6)).all()
    assert np.abs(back - x).max() > 0.3 * allowed.min()  # a bound that is nearly reached is one


def test_ties_go_to_the_lower_index():
    one = jnp.ones((1, 1, 1), jnp.float32)

    def code(dtype, *values):
        return codes.encode(jnp.array([[values]], jnp.float32), one, dtype).reshape(-1).tolist()

    assert code("int2", -1.0, 0.0, 1.0, 1e-9) == [0, 1, 2, 1]  # 1e-9 from 0: the distances are one float32
    assert code("fp4", -5.0, -0.25, 0.0, 0.25, 5.0, 0.3) == [0, 6, 7, 7, 14, 9]
    assert code("int4", 0.0, 0.5, 1.5, -8.6, 9.0) == [8, 8, 10, 0, 15]
    assert code("int8", 0.5, 1.5, -130.0) == [0, 2, -128]


@pytest.mark.parametrize("dtype", GRID)
def test_a_group_of_zeros_has_a_scale(dtype):
    """Its codes are 0 but for two bits, which have none; the scale is too small for float8, so zeros come back."""
    x = jnp.zeros((1, 1, 4), jnp.float32)
    scale = codes.scale_of(x, dtype)
    assert float(scale[0, 0, 0]) > 0
    back = codes.decode(codes.encode(x, scale, dtype), dtype) * codes.to_float8(scale).astype(jnp.float32)
    np.testing.assert_array_equal(back, x)
