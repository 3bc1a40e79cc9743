"""How a causal network's cache is stored: arguments under their published names, and errors that use these."""

import contextlib
import dataclasses
from collections.abc import Iterator

from rcm_jax.causal.blobs import check_parts
from rcm_jax.causal.network import CausalDiT
from rcm_jax.causal.quantised import quantised
from rcm_jax.errors import ArgumentError
from rcm_jax.pipelines.kinds import causal
from rcm_jax.quant import CacheQuant, QuantConfig
from rcm_jax.quant.config import DTYPES, GRANULARITIES, RANGES, SCALE_ROUNDINGS, SMOOTHINGS

OF_EACH = ("dtype", "smoothing", "group_size", "granularity")  # keys and values have their own
OF_BOTH = (
    "smooth_alpha", "clip_percentile", "qvg_clusters", "qvg_iters", "qvg_stages", "qvg_share_assignments",
    "qvg_warm_start", "scale_rounding",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantOptions:
    """Arguments of a call about what a causal network's cache keeps of a chunk's keys (k) and values (v)."""

    kv_dtype_k: str = causal("bf16", "keys in the cache: bf16 as they are (default), or in fewer bits", choices=DTYPES)
    kv_dtype_v: str = causal("bf16", "values in the cache", choices=DTYPES)
    kv_smoothing_k: str = causal("none", "what is done to keys before (default none)", choices=SMOOTHINGS)
    kv_smoothing_v: str = causal("none", "to values", choices=SMOOTHINGS)
    kv_group_size_k: int = causal(64, "numbers of keys that share a scale (default 64; 0: the whole axis)")
    kv_group_size_v: int = causal(64, "of values")
    kv_granularity_k: str = causal("auto", "the axis that these are along: channel for keys", choices=GRANULARITIES)
    kv_granularity_v: str = causal("auto", "token for values", choices=GRANULARITIES)
    kv_smooth_alpha: float = causal(
        0.5, "of balance: how much of a channel's size is divided out (default 0.5)", range=RANGES["smooth_alpha"]
    )
    kv_clip_percentile: float = causal(
        0.999, "of clip: the share of numbers that stay (default 0.999)", range=RANGES["clip_percentile"]
    )
    kv_qvg_clusters: int = causal(256, "of qvg: clusters of tokens (default 256)", range=RANGES["qvg_clusters"])
    kv_qvg_iters: int = causal(4, "rounds of k-means (default 4)", range=RANGES["qvg_iters"])
    kv_qvg_stages: int = causal(1, "how often what is left is clustered again (default 1)", range=RANGES["qvg_stages"])
    kv_qvg_share_assignments: bool = causal(True, "all heads share the clusters (default)")
    kv_qvg_warm_start: bool = causal(True, "clusters start where the last chunk's ended (default)")
    kv_scale_rounding: str = causal(
        "after", "of scales, to float8: after codes are made, as published (default), or before: less error",
        choices=SCALE_ROUNDINGS,
    )  # fmt: skip
    kv_pre_rope_keys: bool = causal(False, "keys before RoPE, as quantised or smoothed ones always are")

    def _config(self, side: str) -> QuantConfig:
        names = {name: f"kv_{name}_{side}" for name in OF_EACH} | {name: f"kv_{name}" for name in OF_BOTH}
        with _named(side):
            return QuantConfig(**{name: getattr(self, flag) for name, flag in names.items()})

    @property
    def cache_quant(self) -> CacheQuant:
        return CacheQuant(self._config("k"), self._config("v"), self.kv_pre_rope_keys)

    def quantised(self, network: CausalDiT, head_parts: int) -> CausalDiT:
        """The network with such a cache, its heads on so many devices. Raises ArgumentError where they do not go
        together."""
        quant = self.cache_quant
        if quant.exact:
            return network
        for side, config in (("k", quant.keys), ("v", quant.values)):
            with _named(side):
                config.check_width(network.dit.config.head_dim)
                check_parts(config, head_parts)
        return dataclasses.replace(network, policy=quantised(network.keeps, quant))


@contextlib.contextmanager
def _named(side: str) -> Iterator[None]:
    """Errors about a `QuantConfig` name the arguments that it is made of."""
    try:
        yield
    except ArgumentError as error:
        flags = {name: f"kv_{name}_{side}" if name in OF_EACH else f"kv_{name}" for name in error.arguments}
        message = error.message
        for name, flag in flags.items():
            message = message.replace(f"{{{name}}}", f"{{{flag}}}")
        raise ArgumentError(message, **{flags[name]: value for name, value in error.arguments.items()}) from error
