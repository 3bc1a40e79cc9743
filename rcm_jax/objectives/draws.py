"""All that is random in a training step, drawn from its key in one place."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rcm_jax.losses.forcing import df_times
from rcm_jax.objectives.config import CausalConfig, DiffusionConfig, MethodConfig
from rcm_jax.types import Latents, Time

KINDS = ("student", "critic", "diffusion")


@dataclasses.dataclass(frozen=True)
class Draws:
    """What a step of one kind needs of these; None for the rest. Times are RF times. A pytree.

    noise, t: of the consistency or the diffusion loss; t is one a sample, one a latent frame, or one a chunk
        (diffusion forcing). u: in place of t for dCM, where on its grid of times a sample starts.
    context_noise: on the context that a causal student sees; used with noisy context alone.
    simulation_noises: of the student's own sampler: the start, then one a step; a causal one's context comes last.
    simulation_t: its times before they are made to fall; None for fixed times.
    score_noise, score_t: with which the scores see the student's video.
    dropped: the samples that lose their text.
    """

    noise: Latents | None = None
    t: Time | Float[Array, "B T"] | None = None
    u: Time | None = None
    context_noise: Latents | None = None
    simulation_noises: Float[Array, "n B T H W C"] | None = None
    simulation_t: Float[Array, "n-1 B"] | None = None
    score_noise: Latents | None = None
    score_t: Time | None = None
    dropped: Bool[Array, " B"] | None = None


jax.tree_util.register_dataclass(Draws, [f.name for f in dataclasses.fields(Draws)], [])


def draw(
    kind: str,
    method: MethodConfig,
    causal: CausalConfig,
    diffusion: DiffusionConfig,
    key: Array,
    shape: tuple[int, int, int, int, int],
) -> Draws:
    """The draws of a `student`, `critic` or `diffusion` step on latents of that shape."""
    if kind == "student":
        key_consistency, key_simulate, key_D = jax.random.split(key, 3)
        consistency = _consistency(method, causal, key_consistency, shape) if method.uses_consistency else {}
        distribution = _distribution(method, causal, key_simulate, key_D, shape) if method.uses_dmd else {}
        return Draws(**consistency, **distribution)
    if kind == "critic":
        return Draws(**_distribution(method, causal, *jax.random.split(key), shape))
    if kind == "diffusion":
        return _diffusion(method, causal, diffusion, key, shape)
    raise ValueError(f"draws of a step of kind {kind!r} are unknown; use one of {KINDS}")


def _consistency(method: MethodConfig, causal: CausalConfig, key: Array, shape: tuple[int, ...]) -> dict[str, Array]:
    key_time, key_noise, *rest = jax.random.split(key, 3 if causal.pattern else 2)
    drawn = {"noise": jax.random.normal(key_noise, shape)}
    if method.consistency == "dcm":
        low, high = method.dcm_range
        drawn["u"] = jax.random.uniform(key_time, shape[:1], minval=low, maxval=high)
    else:
        drawn["t"] = method.p_G.build(method.t_range).sample(key_time, shape[:1])
    if causal.pattern:
        drawn["context_noise"] = jax.random.normal(rest[0], shape)
    return drawn


def _distribution(
    method: MethodConfig, causal: CausalConfig, key_simulate: Array, key_D: Array, shape: tuple[int, ...]
) -> dict[str, Array]:
    key_time, key_noise = jax.random.split(key_D)
    p_D = method.p_D.build(method.t_range)
    drawn = {"score_noise": jax.random.normal(key_noise, shape), "score_t": p_D.sample(key_time, shape[:1])}
    if causal.pattern:
        count = max(causal.steps_per_chunk) + 1
        return drawn | {"simulation_noises": jax.random.normal(key_simulate, (count, *shape))}
    key_start, key_draws, key_steps = jax.random.split(key_simulate, 3)
    n = method.max_simulation_steps
    start, steps = jax.random.normal(key_start, shape), jax.random.normal(key_steps, (n - 1, *shape))
    drawn["simulation_noises"] = jnp.concatenate([start[None], steps])
    if not method.dmd_fixed_times:
        drawn["simulation_t"] = p_D.sample(key_draws, (n - 1, shape[0]))
    return drawn


def _diffusion(
    method: MethodConfig, causal: CausalConfig, diffusion: DiffusionConfig, key: Array, shape: tuple[int, ...]
) -> Draws:
    key_time, key_noise, key_drop, key_last = jax.random.split(key, 4)
    p_G, batch, t, context_noise = method.p_G.build(method.t_range), shape[:1], None, None
    if causal.pattern:
        context_noise = jax.random.normal(key_last, shape)
    if causal.pattern and causal.forcing == "df":
        t = df_times(causal.df_times, p_G, key_time, shape[0], len(causal.spans(shape[1])))
    else:
        t = p_G.sample(key_time, batch)
    if diffusion.frame_times and not causal.pattern:
        key_pick, key_draw = jax.random.split(key_last)
        own = jax.random.bernoulli(key_pick, diffusion.frame_times, batch)
        rising = jnp.sort(p_G.sample(key_draw, shape[:2]), axis=1)
        t = jnp.where(own[:, None], rising, t[:, None])
    dropped = jax.random.bernoulli(key_drop, diffusion.text_dropout, batch) if diffusion.text_dropout else None
    return Draws(jax.random.normal(key_noise, shape), t, context_noise=context_noise, dropped=dropped)
