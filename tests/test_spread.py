"""Rows of frames for tokens on several devices, one text for all videos: the numbers of one device, and nothing sent
that a device does not need."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rcm_jax.parallel import make_mesh, shard, spec
from rcm_jax.spread import (
    for_every_token,
    for_every_video,
    gathered_once,
    gathered_product,
    spread_samples,
    spread_tokens,
)
from rcm_jax.wan.dit import DiT, guided_velocity
from tests.tiny import MODEL, perturbed_params

B, D = 4, 6


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=1, sequence=4)


def sent(function, *arguments):
    """The collectives of a compiled function, each with the shape of its result."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = re.findall(r"= \(?\w+\[([\d,]*)\].* (all-gather|all-reduce|all-to-all|collective-permute)\(", text)
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for dims, kind in found]


@pytest.mark.parametrize(("frames", "each"), [(3, 8), (5, 4), (2, 3), (1, 8)])
def test_rows_are_spread_to_the_tokens_of_their_frames(mesh, frames, each):
    """Cuts within frames, with a frame on several devices, and where four devices do not divide the tokens."""
    rng = np.random.default_rng(0)
    rows, t_rows = (jnp.asarray(rng.normal(size=(B, frames, D)), jnp.float32) for _ in range(2))
    x = jnp.asarray(rng.normal(size=(B, frames * each, D)), jnp.float32)

    def derivatives(rows, t_rows, x):
        """Value, tangent and the gradient of a loss that holds both."""

        def loss(rows):
            spread, tangent = jax.jvp(lambda r: for_every_token(r, frames * each), (rows,), (t_rows,))
            return (x * spread**2 + spread * jax.lax.stop_gradient(tangent)).sum(), (spread, tangent)

        grad, (spread, tangent) = jax.grad(loss, has_aux=True)(rows)
        return spread, tangent, grad

    want = derivatives(rows, t_rows, x)
    np.testing.assert_array_equal(want[0], np.repeat(rows, each, axis=1))
    with jax.set_mesh(mesh):
        got = jax.jit(derivatives)(rows, t_rows, x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_rows_is_summed_where_the_tokens_are(mesh):
    frames, each = 3, 8
    with jax.set_mesh(mesh):
        rows = jax.device_put(jnp.ones((B, frames, D)), NamedSharding(mesh, P("data")))
        x = jax.device_put(jnp.ones((B, frames * each, D)), NamedSharding(mesh, P("data", "sequence")))
        exchanged = sent(jax.grad(lambda rows, x: (x * for_every_token(rows, frames * each)).sum()), rows, x)
    assert exchanged == [("all-reduce", (B // 2, frames, D))]


def test_gathered_weights_bring_no_tangent_along(mesh):
    """One product for the value, one for the tangent of x; a third would be of zeros."""
    x, w = jnp.ones((B, D)), jnp.ones((D, 8))

    def along_x(x, w):
        return jax.jvp(lambda x: gathered_product(x, w, (((1,), (0,)), ((), ()))), (x,), (x,))

    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(jax.jit(along_x))(x, w))
        value, tangent = jax.jit(along_x)(x, w)
        grad = jax.jit(jax.grad(lambda w: (along_x(x, w)[0] ** 2).sum()))(w)
    assert text.count("dot_general[") == 2
    np.testing.assert_array_equal(value, tangent)
    np.testing.assert_allclose(grad, jnp.full((D, 8), 2.0 * D * B))


def test_one_sample_is_spread_to_all_videos_on_its_devices(mesh):
    x = jnp.arange(3.0 * D).reshape(1, 3, D)
    w = jnp.arange(float(B)).reshape(B, 1, 1)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda x: for_every_video(x, B))
        out = run(x)
        grad = jax.jit(jax.grad(lambda x: (w * for_every_video(x, B)).sum()))(x)
        assert not sent(lambda x: for_every_video(x, B), x)
    assert out.sharding.shard_shape(out.shape) == (B // 2, 3, D)
    np.testing.assert_array_equal(out, np.repeat(x, B, axis=0))
    np.testing.assert_array_equal(grad, jnp.full_like(x, w.sum()))
    assert for_every_video(out, B) is out


def test_weights_are_gathered_once_where_there_is_room(mesh, monkeypatch):
    params = perturbed_params(MODEL)
    whole = jax.jit(lambda p: gathered_once(p, "bfloat16"))
    with jax.set_mesh(mesh):
        placed = shard(params, mesh)
        got = whole(placed)
        monkeypatch.setattr("rcm_jax.spread.ROOM", 10_000)
        assert gathered_once(placed, "bfloat16") is placed
    q, before = got["blocks"]["self_attn"]["q"], placed["blocks"]["self_attn"]["q"]
    assert not before["kernel"].sharding.is_fully_replicated
    assert q["kernel"].sharding.is_fully_replicated
    assert (q["kernel"].dtype, got["time_out"]["kernel"].dtype, q["bias"].dtype) == ("bfloat16", "float32", "float32")
    assert got["time_out"]["kernel"].sharding.is_fully_replicated
    assert gathered_once(params, "bfloat16") is params, "without a mesh nothing is cast"


def test_what_does_not_divide_lies_as_the_compiler_likes(mesh):
    with jax.set_mesh(mesh):
        for shape in ((3, 8, D), (B, 7, D), (1, 8, D)):
            x = jnp.ones(shape)
            for held in (spread_tokens, spread_samples):
                np.testing.assert_array_equal(jax.jit(held)(x), x)
                assert held(x) is x, "outside jit nothing moves"


def test_an_unconditional_text_is_embedded_once():
    params, rng = perturbed_params(MODEL), np.random.default_rng(0)
    x, text, null = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, 2, 4, 4, 12), (B, 5, 64), (5, 64)))
    t = jnp.full(B, 0.5)
    one, each = (guided_velocity(DiT(MODEL), params, text, n, 3.0) for n in (null, jnp.stack([null] * B)))
    np.testing.assert_allclose(jax.jit(one)(x, t), jax.jit(each)(x, t), atol=2e-6)
    embedded = re.findall(rf":f32\[(\d+),{MODEL.text_len},{MODEL.dim}\] = tanh", str(jax.make_jaxpr(one)(x, t)))
    assert sorted(embedded) == ["1", str(B)]


def test_weights_lie_on_both_axes_where_these_divide_them():
    def placed(size, **sizes):
        return tuple(spec("x/q/kernel", (4, size, 24), sizes))[1]

    assert placed(24, data=1, fsdp=4, sequence=2) == ("fsdp", "sequence")
    assert placed(24, data=1, fsdp=8, sequence=2) == "fsdp", "3 rows a device are not divided again"
    assert placed(12, data=1, fsdp=8, sequence=4) == "sequence"
    assert placed(24, data=8, fsdp=1, sequence=1) is None
