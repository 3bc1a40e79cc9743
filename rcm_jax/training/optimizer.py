"""AdamW as rCM uses it."""

from collections.abc import Sequence

import jax
import optax

from rcm_jax.training.config import OptimizerConfig
from rcm_jax.types import Params

WARMUP_START = 1e-6  # the learning rate starts at this part of itself


def learning_rate(config: OptimizerConfig, peak: float) -> optax.Schedule:
    """Linear warm-up over `warmup_updates` from 1e-6 of the peak, then constant, or a cosine fall to zero."""
    warmup = optax.linear_schedule(WARMUP_START * peak, peak, max(config.warmup_updates, 1))
    after = optax.constant_schedule(peak)
    if config.decay_updates:
        after = optax.cosine_decay_schedule(peak, max(config.decay_updates - config.warmup_updates, 1))
    return optax.join_schedules([warmup, after], [config.warmup_updates])


def adamw(config: OptimizerConfig, peak: float, frozen: Sequence[str] = ()) -> optax.GradientTransformation:
    """AdamW; with b1 = 0 it is RMSProp with bias correction, and no first moment is stored.

    Parameters below the top-level names in `frozen` stay as they are, without state or decay. Raises ValueError, when
    it meets the parameters, for a name they do not have.
    """
    if config.b1:
        direction = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    else:
        direction = optax.scale_by_rms(decay=config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True)
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts += [
        direction,
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config, peak)),
    ]
    if not frozen:
        return optax.chain(*parts)

    def labels(params: Params) -> Params:
        if unknown := set(frozen) - set(params):
            raise ValueError(f"optimizer.frozen names {sorted(unknown)}; the network's parameters are {sorted(params)}")
        return {
            name: jax.tree.map(lambda _, n=name: "frozen" if n in frozen else "trained", p)
            for name, p in params.items()
        }

    return optax.partition({"trained": optax.chain(*parts), "frozen": optax.set_to_zero()}, labels)
