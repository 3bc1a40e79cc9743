"""Tiles of a frame, blended."""

import numpy as np
import pytest

from rcm_jax.wan.tiles import blend_tiles


def enlarge(latents):
    """A decoder that looks at one latent pixel alone."""
    return np.repeat(np.repeat(latents, 8, axis=2), 8, axis=3)


@pytest.mark.parametrize(("tile", "overlap"), [((6, 7), 2), ((4, 5), 3), ((11, 4), 1), ((32, 32), 8), ((10, 12), 9)])
def test_tiles_add_up(tile, overlap):
    latents = np.random.default_rng(0).normal(size=(2, 3, 11, 13, 3)).astype(np.float32)
    got = blend_tiles(enlarge, latents, 8, tile, overlap)
    np.testing.assert_allclose(got, enlarge(latents), atol=1e-6)


def test_tiles_fade_linearly_into_each_other_and_have_one_size():
    sizes = []

    def numbered(latents):
        sizes.append(latents.shape)
        return np.full((1, 1, 16, 12, 1), float(len(sizes)), np.float32)

    got = blend_tiles(numbered, np.zeros((1, 1, 4, 5, 1)), 4, (4, 3), 1)[0, 0, 0, :, 0]
    assert sizes == [(1, 1, 4, 3, 1)] * 2
    np.testing.assert_allclose(got, [1] * 8 + [1.125, 1.375, 1.625, 1.875] + [2] * 8, atol=1e-6)


@pytest.mark.parametrize("overlap", [0, 4, 5])
def test_an_overlap_that_is_no_part_of_a_tile_is_named(overlap):
    with pytest.raises(ValueError, match=f"overlap={overlap} must be at least 1 and less than .* 4"):
        blend_tiles(enlarge, np.zeros((1, 1, 9, 9, 3)), 8, (4, 5), overlap)
