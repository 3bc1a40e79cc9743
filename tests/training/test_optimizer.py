"""AdamW against optax's own, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rcm_jax.training.config import OptimizerConfig
from rcm_jax.training.optimizer import adamw, learning_rate

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3)}
GRADS = [{"w": jax.random.normal(jax.random.key(i), (2, 3))} for i in range(5)]


def run(optimizer):
    params, state = PARAMS, optimizer.init(PARAMS)
    for grads in GRADS:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params["w"], state


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_it_is_adamw(b1):
    config = OptimizerConfig(lr=1e-2, b1=b1, warmup_updates=0)
    want, _ = run(optax.adamw(1e-2, b1=b1, b2=0.999, eps=1e-8, weight_decay=0.01))
    got, state = run(adamw(config, config.lr))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    moments = [x for x in jax.tree.leaves(state) if x.shape == (2, 3)]
    assert len(moments) == (1 if b1 == 0 else 2), "no first moment is kept when b1 is 0"


def test_learning_rate():
    rate = learning_rate(OptimizerConfig(warmup_updates=100), 2e-6)
    np.testing.assert_allclose(
        [rate(0), rate(50), rate(100), rate(10_000)], [2e-12, 1e-6, 2e-6, 2e-6], rtol=1e-5, atol=1e-13
    )
    cosine = learning_rate(OptimizerConfig(warmup_updates=10, decay_updates=110), 1.0)
    np.testing.assert_allclose([cosine(10), cosine(60), cosine(110)], [1.0, 0.5, 0.0], atol=1e-6)


def test_clipping_bounds_the_global_norm():
    config = OptimizerConfig(lr=1.0, b1=0.9, clip_norm=1e-3, warmup_updates=0)
    clip = adamw(config, 1.0)
    state = clip.init(PARAMS)
    _, state = clip.update({"w": jnp.full((2, 3), 100.0)}, state, PARAMS)
    moments = [x for x in jax.tree.leaves(state) if x.shape == (2, 3)]
    np.testing.assert_allclose(jnp.linalg.norm(moments[0]), 0.1 * 1e-3, rtol=1e-4)


def test_frozen_parameters_stay_and_have_no_state():
    params = {"time_in": {"kernel": jnp.ones((2, 3))}, "head": {"kernel": jnp.ones((3, 2))}}
    optimizer = adamw(OptimizerConfig(lr=1e-2, warmup_updates=0, weight_decay=0.1), 1e-2, frozen=("time_in",))
    state = optimizer.init(params)
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["time_in"]["kernel"], params["time_in"]["kernel"])
    assert (new["head"]["kernel"] != params["head"]["kernel"]).all()
    assert [x.shape for x in jax.tree.leaves(state) if x.ndim] == [(3, 2)], "state for the trained parameter alone"
    with pytest.raises(ValueError, match=r"frozen names \['tme_in'\].*'time_in'"):
        adamw(OptimizerConfig(), 1e-2, frozen=("tme_in",)).init(params)
