"""The autoencoder in pieces and whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.wan.config import WAN22_VAE, WAN_VAE, VAEConfig
from rcm_jax.wan.networks import abstract_network
from rcm_jax.wan.vae import VAE
from tests.wan.tiny import pieces

SMALL = VAEConfig(
    dim=4, z_dim=3, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True),
    mean=(0.5, -1.0, 0.0), std=(2.0, 1.5, 0.5),
)  # fmt: skip
RESIDUAL = VAEConfig(  # of Wan2.2's form
    dim=4, z_dim=3, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(False, True), decoder_dim=6,
    patch_size=2, residual=True, mean=(0.5, -1.0, 0.0), std=(2.0, 1.5, 0.5),
)  # fmt: skip
VIDEO = np.random.default_rng(0).uniform(-1, 1, (2, 9, 16, 20, 3)).astype(np.float32)
LATENTS = np.random.default_rng(1).normal(size=(2, 3, 4, 5, 3)).astype(np.float32)


@functools.cache
def params(config=SMALL):
    """Every leaf random, drawn on the host: compiling `init` takes longer than all that is tested here."""
    rng = np.random.default_rng(2)

    def draw(leaf):
        wide = leaf.ndim > 1
        return rng.normal(size=leaf.shape, loc=0 if wide else 0.5, scale=0.3 / np.sqrt(leaf.shape[-1] if wide else 1))

    shapes = jax.eval_shape(VAE(config).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: draw(leaf).astype(np.float32), shapes)  # NumPy's: the first call may be under jit


@pytest.mark.parametrize("lengths", [(9,), (1, 4, 4), (1, 8), (5, 4)])
def test_encoding_in_chunks_is_encoding(lengths):
    got, states = pieces(params(), VAE(SMALL).encode_chunk, VIDEO, lengths)
    np.testing.assert_allclose(got, VAE(SMALL).encode(params(), VIDEO), atol=2e-5)
    shapes = [jax.tree.map(jnp.shape, state) for state in states]
    assert all(s == shapes[0] for s in shapes)


@pytest.mark.parametrize("lengths", [(3,), (1, 1, 1), (1, 2), (2, 1)])
def test_decoding_in_chunks_is_decoding(lengths):
    got, states = pieces(params(), VAE(SMALL).decode_chunk, LATENTS, lengths)
    assert got.shape == VIDEO.shape
    np.testing.assert_allclose(got, VAE(SMALL).decode(params(), LATENTS), atol=2e-5)
    shapes = [jax.tree.map(jnp.shape, state) for state in states]
    assert all(s == shapes[0] for s in shapes)


def test_one_program_serves_all_chunks_but_the_first():
    traces = []

    @jax.jit
    def decode(latents, state):
        traces.append(state is None)
        return VAE(SMALL).decode_chunk(params(), latents, state)

    state = None
    for i in (0, 1, 2, 1, 0):
        frames, state = decode(LATENTS[:, i : i + 1], state)
        assert frames.shape[1] == (4 if len(traces) > 1 else 1)
    assert traces == [True, False]


def test_the_stream_gives_one_frame_then_four():
    parts = list(VAE(SMALL).stream(params(), LATENTS))
    assert [p.shape[1] for p in parts] == [1, 4, 4]


@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_wan22_s_in_chunks_is_whole(length):
    """What goes past a level keeps nothing: a video's first frame is averaged with zeros, and copied once."""
    vae, movie, z = VAE(RESIDUAL), VIDEO[:, :5, :, :16], LATENTS[:, :, :2, :2]
    lengths = [1 + RESIDUAL.time * (length - 1), RESIDUAL.time * (3 - length)]
    got, states = pieces(params(RESIDUAL), vae.encode_chunk, movie, lengths)
    np.testing.assert_allclose(got, vae.encode(params(RESIDUAL), movie), atol=2e-5)
    assert len({str(jax.tree.map(jnp.shape, state)) for state in states}) == 1
    got, _ = pieces(params(RESIDUAL), vae.decode_chunk, z, [length, 3 - length])
    assert got.shape == movie.shape
    np.testing.assert_allclose(got, vae.decode(params(RESIDUAL), z), atol=2e-5)


def test_no_frame_depends_on_a_later_one():
    vae = VAE(SMALL)
    later = VIDEO.copy()
    later[:, 5:] = 0.0
    a, b = vae.encode(params(), VIDEO), vae.encode(params(), later)
    np.testing.assert_array_equal(a[:, :2], b[:, :2])
    assert np.abs(a[:, 2] - b[:, 2]).max() > 1e-3
    other = LATENTS.copy()
    other[:, 2] = 0.0
    a, b = vae.decode(params(), LATENTS), vae.decode(params(), other)
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 1e-3


def test_latents_are_normalised_a_channel():
    plain = dataclasses.replace(SMALL, mean=(0.0,) * 3, std=(1.0,) * 3)
    raw = VAE(plain).encode(params(), VIDEO)
    normal = VAE(SMALL).encode(params(), VIDEO)
    np.testing.assert_allclose(np.asarray(normal) * np.float32(SMALL.std) + np.float32(SMALL.mean), raw, atol=1e-5)
    np.testing.assert_allclose(VAE(SMALL).decode(params(), normal), VAE(plain).decode(params(), raw), atol=1e-4)


def test_samples_of_a_batch_do_not_touch():
    for function, x in ((VAE(SMALL).encode, VIDEO), (VAE(SMALL).decode, LATENTS)):
        np.testing.assert_allclose(function(params(), x[1:]), function(params(), x)[1:], atol=2e-5)


@pytest.mark.long
def test_bfloat16_weights_run_and_stay_close():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params())
    vae = VAE(dataclasses.replace(SMALL, dtype="bfloat16"))
    for got, want in (
        (vae.decode(half, LATENTS), VAE(SMALL).decode(params(), LATENTS)),
        (vae.encode(half, VIDEO), VAE(SMALL).encode(params(), VIDEO)),
    ):
        assert got.dtype == jnp.float32
        assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 5e-2


@pytest.mark.parametrize(
    ("config", "count"), [(WAN_VAE, 126_892_531), (WAN22_VAE, 704_688_668)], ids=["wan2.1", "wan2.2"]
)
def test_published_size(config, count):
    """The parameter counts of the released autoencoders, and what they make of a video."""
    params = abstract_network(config)
    assert sum(np.prod(p.shape) for p in jax.tree.leaves(params)) == count
    assert (config.time, config.space, config.z_dim) == ((4, 8, 16) if config == WAN_VAE else (4, 16, 48))


def test_one_tile_over_all_is_no_tiling():
    vae = VAE(SMALL)
    np.testing.assert_allclose(vae.decode_tiled(params(), LATENTS), vae.decode(params(), LATENTS), atol=1e-6)
    tiled = vae.decode_tiled(params(), LATENTS, tile=(4, 4), overlap=2)
    assert tiled.shape == VIDEO.shape
    np.testing.assert_allclose(tiled[:, :, :, :4], vae.decode(params(), LATENTS[:, :, :, :4])[:, :, :, :4], atol=2e-5)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 8, 16, 16, 3), (1, 9, 14, 16, 3), (1, 9, 16, 18, 3), (1, 9, 16, 16, 4), (1, 0, 16, 16, 3)]
)
def test_a_video_that_does_not_fit_is_named(shape):
    with pytest.raises(ValueError, match=r"video has shape .* give \[B, 1 \+ 4k, 4H, 4W, 3\]"):
        VAE(SMALL).encode(params(), jnp.zeros(shape))


@pytest.mark.slow
def test_a_chunk_that_does_not_fit_is_named():
    _, state = VAE(SMALL).encode_chunk(params(), VIDEO[:, :1])
    with pytest.raises(ValueError, match=r"video has shape \(2, 3, .* give \[B, 4k, 4H, 4W, 3\]"):
        VAE(SMALL).encode_chunk(params(), VIDEO[:, 1:4], state)


@pytest.mark.parametrize("shape", [(1, 2, 4, 4, 16), (1, 0, 4, 4, 3)])
def test_latents_that_do_not_fit_are_named(shape):
    with pytest.raises(ValueError, match=r"latents have shape .* give \[B, at least 1, H, W, 3\]"):
        VAE(SMALL).decode(params(), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"temporal_downsample": (True,)}, "between two of dim_mult"), ({"z_dim": 4}, "3 and 3 entries; z_dim is 4")],
)
def test_wrong_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_either_half_serves_alone():
    vae = VAE(SMALL)
    latents = vae.encode({"encoder": params()["encoder"]}, VIDEO)
    assert vae.decode({"decoder": params()["decoder"]}, latents).shape == VIDEO.shape
