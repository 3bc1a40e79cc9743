"""What a causal video keeps of its past: flags under their published names."""

import dataclasses

from rcm_jax.causal.cache import CachePolicy
from rcm_jax.causal.policies import POLICIES, policy_of
from rcm_jax.errors import ArgumentError
from rcm_jax.pipelines.kinds import causal
from rcm_jax.ranges import Range, at_least, between


def _prefixed(prefix: str, *names: str) -> dict[str, str]:
    return {prefix + name: name for name in names}


FLAGS = {  # of each policy: its fields by their flags
    "sliding_window": {"window_blocks": "window_blocks", "sw_sink_blocks": "sink_blocks"},
    "rolling_sink": _prefixed("", "total_blocks", "sink_blocks", "recent_blocks"),
    "infinity_rope": {"ir_sink_blocks": "sink_blocks"} | _prefixed(
        "", "cache_blocks", "f_limit", "flush_interval_blocks", "rope_cut_delta", "rope_cut_single_frame"
    ),
    "deep_forcing": _prefixed("df_", "sink_frames", "budget_frames", "recent_frames", "observation_layers"),
    "memrope": _prefixed("mr_", "sink_frames", "local_frames", "alpha_long", "alpha_short"),
    "relax_forcing": _prefixed("rx_", "sink_frames", "budget_frames", "recent_frames", "alignment_weight"),
}  # fmt: skip
SHARE = Range(0, 1, open=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """Which policy keeps the cache, and its settings; what is not given is as published."""

    cache_policy: str | None = causal(
        None, "what of the past stays in the cache (default: as trained, see --window)", choices=tuple(POLICIES)
    )
    window_blocks: int | None = causal(None, "sliding_window: chunks that are cached (6)", range=at_least(1))
    sw_sink_blocks: int | None = causal(None, "sliding_window: first ones of them that stay (0)", range=at_least(0))
    total_blocks: int | None = causal(None, "rolling_sink: chunks of the bank (6)", range=at_least(1))
    sink_blocks: int | None = causal(None, "rolling_sink: chunks of it that are seen (5)", range=at_least(0))
    recent_blocks: int | None = causal(None, "rolling_sink: latest chunks that are seen (1)", range=at_least(0))
    cache_blocks: int | None = causal(None, "infinity_rope: chunks that are cached (6)", range=at_least(1))
    ir_sink_blocks: int | None = causal(None, "infinity_rope: first ones of them that stay (1)", range=at_least(0))
    f_limit: int | None = causal(None, "infinity_rope: latent frames of positions (21)", range=at_least(1))
    flush_interval_blocks: int | None = causal(
        None, "infinity_rope: chunks from flush to flush; 0: none (0)", range=at_least(0)
    )
    rope_cut_delta: int | None = causal(None, "infinity_rope: latent frames that a cut is away (21)", range=at_least(0))
    rope_cut_single_frame: bool | None = causal(None, "infinity_rope: chunks of one frame are cut away, too (yes)")
    df_sink_frames: int | None = causal(None, "deep_forcing: first latent frames that stay (10)", range=at_least(0))
    df_budget_frames: int | None = causal(None, "deep_forcing: latent frames in all (16)", range=at_least(1))
    df_recent_frames: int | None = causal(None, "deep_forcing: latest ones, which choose (4)", range=at_least(1))
    df_observation_layers: int | None = causal(
        None, "deep_forcing: last layers that choose; 0: all (0)", range=at_least(0)
    )
    mr_sink_frames: int | None = causal(None, "memrope: first latent frames that stay (3)", range=at_least(0))
    mr_local_frames: int | None = causal(None, "memrope: latest ones (4)", range=at_least(1))
    mr_alpha_long: float | None = causal(None, "memrope: how fast the slow mean follows (0.01)", range=SHARE)
    mr_alpha_short: float | None = causal(None, "memrope: how fast the fast one does (0.1)", range=SHARE)
    rx_sink_frames: int | None = causal(None, "relax_forcing: first latent frames that stay (4)", range=at_least(0))
    rx_budget_frames: int | None = causal(None, "relax_forcing: latent frames in all (16)", range=at_least(1))
    rx_recent_frames: int | None = causal(None, "relax_forcing: latest ones (4)", range=at_least(1))
    rx_alignment_weight: float | None = causal(
        None, "relax_forcing: weight of being like the latest frames against being unlike others (0.5)",
        range=between(0, 1),
    )  # fmt: skip

    def policy(self, cuts: tuple[int, ...] = ()) -> CachePolicy | None:
        """The policy that is asked for; None where the network's window says it. cuts: chunks with a scene cut.

        Raises ArgumentError for settings of another policy, and for what does not go together.
        """
        for policy, flags in FLAGS.items():
            for flag in flags:
                if policy != self.cache_policy and getattr(self, flag) is not None:
                    raise ArgumentError(
                        f"{{{flag}}} is for {{cache_policy}} {policy}", **{flag: None, "cache_policy": None}
                    )
        if self.cache_policy is None:
            return None
        flags = FLAGS.get(self.cache_policy, {})
        given = {field: getattr(self, flag) for flag, field in flags.items() if getattr(self, flag) is not None}
        try:
            return policy_of(self.cache_policy, **given, **({"cuts": cuts} if cuts else {}))
        except ArgumentError as error:
            raise error.renamed({field: flag for flag, field in flags.items()}) from None
