"""How keys or values are stored: their width, what is done to them before, and which numbers share a scale."""

import dataclasses

from rcm_jax.errors import ArgumentError
from rcm_jax.ranges import Range, at_least, between

DTYPES = ("bf16", "fp8", "fp4", "int8", "int4", "int2")
SMOOTHINGS = ("none", "clip", "balance", "hadamard", "reorder", "qvg")
GRANULARITIES = ("auto", "token", "channel", "head", "tensor")
SCALE_ROUNDINGS = ("after", "before")
CHOICES = {
    "dtype": DTYPES, "smoothing": SMOOTHINGS, "granularity": GRANULARITIES, "scale_rounding": SCALE_ROUNDINGS,
}  # fmt: skip
RANGES = {
    "smooth_alpha": between(0, 1),
    "clip_percentile": Range(0, 1, open=True),
    "qvg_clusters": at_least(1),
    "qvg_iters": at_least(1),
    "qvg_stages": at_least(1),
}


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How keys, or values, are stored.

    group_size: numbers that share a scale, along the axis that `granularity` names; 0 or less is the whole axis.
    granularity: that axis: the channels of a token's head, the chunk's tokens of a channel, all numbers of a head, or
        all of a video. `auto` is channel for keys and token for values (`CacheQuant` knows which is which).
    smooth_alpha: of `balance`: how much of a channel's size is divided out.
    clip_percentile: of `clip`: the share of numbers, by size, that stay as they are.
    qvg_*: of `qvg`: clusters of tokens, rounds of k-means, how often what is left is clustered again, whether all heads
        share the clusters, and whether a chunk's clusters start where the last chunk's ended.
    scale_rounding: to float8, after codes were made with the exact scale, as published, or before, upwards: then the
        codes are those of the scale that is stored, and its rounding is no error of what comes back.
    """

    dtype: str = "bf16"
    smoothing: str = "none"
    group_size: int = 64
    granularity: str = "auto"
    smooth_alpha: float = 0.5
    clip_percentile: float = 0.999
    qvg_clusters: int = 256
    qvg_iters: int = 4
    qvg_stages: int = 1
    qvg_share_assignments: bool = True
    qvg_warm_start: bool = True
    scale_rounding: str = "after"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ArgumentError(f"{{{name}}} must be one of {', '.join(choices)}", **{name: getattr(self, name)})
        for name, allowed in RANGES.items():
            if getattr(self, name) not in allowed:
                raise ArgumentError(f"{{{name}}} must be {allowed}", **{name: getattr(self, name)})

    @property
    def exact(self) -> bool:
        """Whether nothing is done at all: what comes is kept in bfloat16."""
        return self.dtype == "bf16" and self.smoothing == "none"

    @property
    def plain(self) -> bool:
        """Whether codes and scales are all: there is no smoothing that has to be undone."""
        return self.smoothing in ("none", "clip")

    @property
    def crosses_heads(self) -> bool:
        """Whether numbers of several heads share a scale, so that heads cannot be stored apart."""
        return self.dtype != "bf16" and self.granularity == "tensor"

    def along(self, granularity: str) -> "QuantConfig":
        """The same, with `auto` settled."""
        return dataclasses.replace(self, granularity=granularity) if self.granularity == "auto" else self

    def check_width(self, width: int) -> None:
        """Raises ArgumentError where heads of this width cannot be stored so."""
        if self.smoothing == "hadamard" and width & (width - 1):
            raise ArgumentError(
                f"{{smoothing}} needs a head width that is a power of two, not {width}", smoothing=self.smoothing
            )
        in_tokens = self.dtype != "bf16" and self.granularity == "token"
        if in_tokens and 0 < self.group_size < width and width % self.group_size:
            raise ArgumentError(
                f"{{group_size}} must divide the head width, {width}, or be 0 for all of it", group_size=self.group_size
            )


@dataclasses.dataclass(frozen=True)
class CacheQuant:
    """How a cache's keys and values are stored. `unrotated`: keys before RoPE, as they always are when not exact."""

    keys: QuantConfig = QuantConfig()
    values: QuantConfig = QuantConfig()
    unrotated: bool = False

    def __post_init__(self) -> None:
        keys = self.keys.along("token" if self.keys.dtype == "bf16" else "channel")
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "values", self.values.along("token"))
        object.__setattr__(self, "unrotated", self.unrotated or not keys.exact)

    @property
    def exact(self) -> bool:
        """Whether the ordinary cache serves."""
        return self.keys.exact and self.values.exact

    @property
    def crosses_heads(self) -> bool:
        """Whether heads cannot be stored apart."""
        return self.keys.crosses_heads or self.values.crosses_heads

    def check_width(self, width: int) -> None:
        """Raises ArgumentError where heads of this width cannot be stored so."""
        self.keys.check_width(width)
        self.values.check_width(width)
