"""What a reader's changes make of a stream's settings."""

from rcm_jax.serve.engine import with_changes


def test_a_policy_has_its_own_settings():
    own = {"cache_policy": "sliding_window", "window_blocks": 3, "sw_sink_blocks": 1, "num_steps": 2}
    other = with_changes(own, {"cache_policy": "memrope", "seed": 5}, own)
    assert other == {"cache_policy": "memrope", "num_steps": 2, "seed": 5}
    assert with_changes(other, {"cache_policy": "sliding_window"}, own) == own | {"seed": 5}
    assert with_changes(own, {"seed": 1}, own) == own | {"seed": 1}
