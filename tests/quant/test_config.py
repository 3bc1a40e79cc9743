"""What a quantised cache is asked for: what goes together, and one line for what does not."""

import jax.numpy as jnp
import pytest

from rcm_jax.errors import ArgumentError
from rcm_jax.quant import CacheQuant, QuantConfig, store

WRONG = [
    ({"dtype": "int3"}, "dtype=int3 must be one of bf16, fp8, fp4, int8, int4, int2"),
    ({"smoothing": "svd"}, "smoothing=svd must be one of none, clip, balance, hadamard, reorder, qvg"),
    ({"granularity": "row"}, "granularity=row must be one of auto, token, channel, head, tensor"),
    ({"scale_rounding": "up"}, "scale_rounding=up must be one of after, before"),
    ({"smooth_alpha": 1.5}, "smooth_alpha=1.5 must be at least 0 and at most 1"),
    ({"clip_percentile": 0.0}, "clip_percentile=0.0 must be above 0 and at most 1"),
    ({"qvg_clusters": 0}, "qvg_clusters=0 must be at least 1"),
    ({"qvg_iters": 0}, "qvg_iters=0 must be at least 1"),
    ({"qvg_stages": 0}, "qvg_stages=0 must be at least 1"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_a_wrong_setting_is_one_line(settings, message):
    with pytest.raises(ArgumentError) as error:
        QuantConfig(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "width", "message"),
    [
        ({"smoothing": "hadamard"}, 96, "smoothing=hadamard needs a head width that is a power of two, not 96"),
        (
            {"dtype": "int4", "group_size": 64},
            96,
            "group_size=64 must divide the head width, 96, or be 0 for all of it",
        ),
    ],
)
def test_a_head_width_that_does_not_fit(settings, width, message):
    """Said by the settings alone, before there is a chunk, and by `store`."""
    quant = CacheQuant(values=QuantConfig(**settings))
    for refused in (lambda: quant.check_width(width), lambda: store(jnp.zeros((1, 4, 1, width)), quant.values)):
        with pytest.raises(ArgumentError) as error:
            refused()
        assert str(error.value) == message
    CacheQuant(values=QuantConfig(dtype="int4", group_size=64)).check_width(32)  # one group is the whole axis
    CacheQuant(keys=QuantConfig(dtype="int4", group_size=64)).check_width(96)  # keys' groups run over tokens


def test_auto_is_settled_by_what_is_stored():
    quant = CacheQuant(QuantConfig("int8"), QuantConfig("int8"))
    assert (quant.keys.granularity, quant.values.granularity) == ("channel", "token")
    assert CacheQuant(QuantConfig(smoothing="balance")).keys.granularity == "token"
    assert CacheQuant(QuantConfig("int8", granularity="head")).keys.granularity == "head"
    with pytest.raises(ArgumentError, match="^granularity=auto is settled by CacheQuant, or must be given$"):
        store(jnp.zeros((1, 4, 1, 8)), QuantConfig("int8"))


def test_keys_are_kept_before_rope_where_they_are_changed():
    assert CacheQuant().exact
    assert not CacheQuant().unrotated
    assert CacheQuant(QuantConfig("int8")).unrotated
    assert CacheQuant(QuantConfig(smoothing="clip")).unrotated
    values = CacheQuant(values=QuantConfig("int8"))
    assert not values.unrotated
    assert not values.exact
    assert CacheQuant(unrotated=True).unrotated
