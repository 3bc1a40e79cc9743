"""One network in three forms: packed under a mask, chunk by chunk on a cache, and the plain DiT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkPattern
from rcm_jax.wan.dit import DiT, velocity
from tests.tiny import MODEL as TINY
from tests.tiny import perturbed_params

MODEL = dataclasses.replace(TINY, remat="none")
SIZE = (4, 4)
TEXT = jax.random.normal(jax.random.key(3), (2, 5, MODEL.text_dim))


@pytest.fixture(scope="module")
def params():
    return perturbed_params(MODEL)


def causal(pattern, frames, window=None, sink=0):
    return CausalDiT(DiT(MODEL), ChunkPattern.parse(pattern), frames, SIZE, window, sink)


def latents(frames, seed, batch=2):
    return jax.random.normal(jax.random.key(seed), (batch, frames, *SIZE, MODEL.in_channels))


def on_the_cache(network, params, clean, noisy, t):
    """Velocity of every noisy chunk, with the clean chunks before it in the cache; one compiled chunk for all."""
    prompt, cache = network.prompt(params, TEXT), network.init_cache(clean.shape[0])
    step, out = jax.jit(network.step), []
    for i, (a, b) in enumerate(network.pattern.spans(clean.shape[1])):
        chunk = jnp.int32(i)
        out.append(step(params, noisy[:, a:b], t, prompt, cache, chunk)[0])
        _, cache = step(params, clean[:, a:b], jnp.zeros_like(t), prompt, cache, chunk)
    return jnp.concatenate(out, axis=1)


@pytest.mark.parametrize(
    ("pattern", "frames", "window", "sink"),
    [
        ("c3-3", 6, None, 0), ("c1-2", 7, None, 0), ("c1-1", 7, 3, 1), ("c1-2", 9, 2, 0), ("c1-2", 9, 1, 0),
        ("c3-1", 9, 3, 0), ("c2-1", 8, 3, 2), ("c2-2", 8, 2, 0),
    ],
)  # fmt: skip
def test_the_cache_is_packed_teacher_forcing(params, pattern, frames, window, sink):
    network = causal(pattern, frames, window, sink)
    clean, noisy, t = latents(frames, 1), latents(frames, 2), jnp.array([0.3, 0.8])
    packed = jax.jit(network.forced_velocity(params, TEXT, clean))(noisy, t)
    np.testing.assert_allclose(on_the_cache(network, params, clean, noisy, t), packed, atol=2e-5)


def test_with_a_window_the_cache_does_not_grow(params):
    network = causal("c1-1", 3, window=3, sink=1)
    tokens = network.init_cache(1).k.shape[2]
    assert tokens == (1 + 2) * network.frame_tokens  # the sink, and what the window has besides the current chunk
    frames = 30  # ten times what it was made for
    clean, noisy, t = latents(frames, 1), latents(frames, 2), jnp.array([0.3, 0.8])
    longer = dataclasses.replace(network, frames=frames)
    packed = jax.jit(longer.forced_velocity(params, TEXT, clean))(noisy, t)
    np.testing.assert_allclose(on_the_cache(network, params, clean, noisy, t), packed, atol=2e-5)


def test_one_chunk_is_the_plain_network(params):
    network, x, t = causal("c4-4", 4), latents(4, 1), jnp.array([0.3, 0.8])
    np.testing.assert_allclose(
        jax.jit(network.velocity(params, TEXT))(x, t), jax.jit(velocity(network.dit, params, TEXT))(x, t), atol=1e-5
    )


def test_a_chunk_does_not_see_what_comes_after_it(params):
    network, x, t = causal("c1-2", 5), latents(5, 1), jnp.array([0.3, 0.8])
    other = x.at[:, 3:].set(latents(2, 9))
    run = jax.jit(network.velocity(params, TEXT))
    v, w = run(x, t), run(other, t)
    np.testing.assert_allclose(v[:, :3], w[:, :3], atol=1e-6)
    assert jnp.abs(v[:, 3:] - w[:, 3:]).max() > 1e-2


def test_noisy_context_is_seen_at_its_time(params):
    network, x, t = causal("c1-1", 3), latents(3, 1), jnp.array([0.3, 0.8])
    run = jax.jit(lambda t_context: network.forced_velocity(params, TEXT, x, t_context)(x, t))
    clean, late = run(jnp.zeros((2, 3))), run(jnp.full((2, 3), 0.6))
    np.testing.assert_allclose(clean[:, 0], late[:, 0], atol=1e-6)  # which sees no context
    assert jnp.abs(clean[:, 1:] - late[:, 1:]).max() > 1e-3


def test_what_cannot_be(params):
    network = causal("c1-2", 5)
    prompt, cache, t = network.prompt(params, TEXT), network.init_cache(2), jnp.zeros(2)
    with pytest.raises(ValueError, match=r"chunk 3 ends at latent frame 7, but the cache holds 5"):
        network.append(params, latents(2, 1), t, prompt, cache, 3)
    with pytest.raises(ValueError, match=r"chunk 1 of pattern c1-2 has 2 latent frames, not 1"):
        network.append(params, latents(1, 1), t, prompt, cache, 1)
    with pytest.raises(ValueError, match=r"window=1 is smaller than sink=2"):
        causal("c1-1", 3, window=1, sink=2)
    with pytest.raises(ValueError, match=r"c1-2 does not fit 4 latent frames"):
        causal("c1-2", 4)
