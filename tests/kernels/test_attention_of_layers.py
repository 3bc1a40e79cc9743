"""Keys in one layer of a cache, which is read where it lies: as if they stood in front of a chunk's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.kernels.attention import Past, attention
from rcm_jax.kernels.choice import Call, explain
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.target import Target
from tests.kernels.attention_cases import BACKENDS, close

L, B, S, P, N, D, V = 3, 2, 7, 40, 2, 8, 6
NAMES = ("q", "k", "v", "K", "V")


def operands():
    rng = np.random.default_rng(0)
    shapes = (B, S, N, D), (B, S, N, D), (B, S, N, V), (L, B, P, N, D), (L, B, P, N, V)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in zip(NAMES, shapes, strict=True)}


def on_the_stack(x, layer, kv_len, **static):
    past = Past(x["K"], x["V"], KeyRuns(kv_len=kv_len), layer)
    return attention(x["q"], x["k"], x["v"], past=past, **static)


def in_front(x, layer, kv_len, **static):
    """The keys that are seen, one behind the other."""
    k, v = (jnp.concatenate([x[n.upper()][layer][:, :kv_len], x[n]], axis=1) for n in "kv")
    return attention(x["q"], k, v, **static)


@pytest.mark.parametrize("backend", [*BACKENDS, "pallas_triton"])
@pytest.mark.parametrize("kv_len", [0, 13, P])
def test_a_layer_is_read_where_it_lies(backend, kv_len):
    x, backend = operands(), BACKENDS.get(backend, backend)
    run = jax.jit(lambda x, layer, kv_len: on_the_stack(x, layer, kv_len, implementation=backend))
    for layer in (0, L - 1):
        want = in_front(x, layer, kv_len, implementation="reference")
        close(run(x, jnp.int32(layer), jnp.int32(kv_len)), want)


@pytest.mark.parametrize("backend", ["xla", pytest.param("pallas_triton", marks=pytest.mark.long)])
def test_its_derivatives(backend):
    x, layer, kv_len = operands(), 1, 13

    def derivatives(attend):
        def loss(x):
            return (attend(x, layer, kv_len, implementation=backend) ** 2).sum()

        moving = {n: jnp.cos(x[n]) for n in "qkv"}
        own = lambda y: attend(x | y, layer, kv_len, implementation=backend)  # noqa: E731
        return jax.grad(loss)(x), jax.jvp(own, ({n: x[n] for n in "qkv"},), (moving,))

    close(jax.jit(lambda: derivatives(on_the_stack))(), jax.jit(lambda: derivatives(in_front))())


@pytest.mark.parametrize("mapped", ["layer", "stack", "kv_len", "queries"])
def test_vmap(mapped):
    x, layer, kv_len = operands(), jnp.int32(1), jnp.int32(13)
    two = {"layer": jnp.arange(2), "kv_len": jnp.array([5, P])}
    if mapped in two:
        layer, kv_len = (two[mapped] if mapped == name else y for name, y in (("layer", layer), ("kv_len", kv_len)))
        axes = (None, 0 if mapped == "layer" else None, 0 if mapped == "kv_len" else None)
    else:
        names = "KV" if mapped == "stack" else "qkv"
        x = x | {n: jnp.stack([x[n], -x[n]]) for n in names}
        axes = ({n: 0 if n in names else None for n in NAMES}, None, None)
    got = jax.vmap(lambda *a: on_the_stack(*a, implementation="xla"), in_axes=axes)(x, layer, kv_len)
    for i in range(2):
        own = {n: x[n][i] if isinstance(axes[0], dict) and axes[0][n] == 0 else x[n] for n in NAMES}
        at = [int(y[i]) if y.ndim else int(y) for y in (layer, kv_len)]
        close(got[i], in_front(own, *at, implementation="xla"))


def test_cudnn_which_would_copy_is_not_chosen():
    gpu = Target("NVIDIA H100 80GB HBM3", 9.0)
    call = Call(gpu, True, "bfloat16", (128, 128), 1560, 1560, stack=True)
    assert "it would copy a layer of the stack" in str(explain(call)[0])


def test_operands_that_do_not_fit():
    x = operands()
    with pytest.raises(ValueError, match=r"q, k and v must have one batch size"):
        on_the_stack(x | {"K": x["K"][:, :1], "V": x["V"][:, :1]}, 0, 3)
