"""Self forcing (arXiv 2506.08009): the student's own causal rollout, differentiable in its parameters.

Every chunk is sampled with the student's sampler on the cache of its own earlier chunks. The gradient goes through each
chunk's last step alone, context and earlier steps are detached: so `dmd_loss` of this video is `sf_dmd`.

With `replay`, nothing of the rollout is kept for the backward pass but every chunk's last input and the one cache of
the end, of which chunk i sees the part before it. The backward pass runs the last steps again, chunk by chunk: the
same gradient with the memory of one chunk.

On a mesh the weights are gathered once for all chunks and steps, where there is room for them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from rcm_jax.causal.cache import Cache, Ring
from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkIndex, Spans
from rcm_jax.flow import rf_noisy
from rcm_jax.parallel import stay_sharded
from rcm_jax.sampling.few_step import next_state
from rcm_jax.sampling.rollout import Noises, equal_chunks, joined, whole_noises
from rcm_jax.sampling.schedules import RolloutSchedule
from rcm_jax.spread import gathered_once
from rcm_jax.types import Latents, Params
from rcm_jax.wan.layers import KeyValues


def self_rollout(
    network: CausalDiT,
    params: Params,
    text: Float[Array, "B L D"],
    noises: Noises,
    schedule: RolloutSchedule,
    num_steps: Int[Array, ""] | int,
    *,
    frames: int,
    replay: bool = False,
) -> tuple[Latents, Latents]:
    """(video, input of every chunk's last step), both [B, T, H, W, C]; only the video carries a gradient.

    num_steps: how many steps are simulated, may be traced; a chunk with fewer in the schedule runs all of its own.
        A chunk that stops before its last step still gives its context at the time of its last: noised, under noisy
        context, as it is otherwise.
    noises: one for each step of the longest chunk, then one for the context.

    Raises ValueError for a window or another policy of the cache, under which the last one would not hold what the
    first chunks saw.
    """
    if network.keeps != Ring():
        raise ValueError(f"self forcing needs the whole past in the cache, not {network.keeps}")
    spans = network.pattern.spans(frames)
    schedule.check_chunks(len(spans))
    run = _replayed if replay else _plain
    draws = whole_noises(noises, spans)  # so that the rollout is a function of arrays
    return run(network, schedule, spans, params, text, draws, jnp.asarray(num_steps, jnp.int32))


def _denoise(
    network: CausalDiT, params: Params, prompt: KeyValues, cache: Cache, chunk: ChunkIndex, x: Latents, t: Array
) -> Latents:
    v = network.denoise(params, x, jnp.broadcast_to(t, x.shape[:1]), prompt, cache, chunk)
    return x - t * v.astype(x.dtype)


def _chunks(
    network: CausalDiT, schedule: RolloutSchedule, spans: Spans, params: Params, prompt: KeyValues, draws: Array,
    num_steps: Array,
) -> tuple[list[tuple[Array, Array, Array]], Cache]:  # fmt: skip
    """(clean chunks, inputs of their last steps, times of these) of every group of equal chunks, [chunks, …], and the
    cache of the end. Only the clean chunks carry a gradient, through the last steps."""
    fixed, fixed_prompt = stop_gradient((_gathered(network, params), prompt))
    cache, groups = network.init_cache(draws.shape[1]), []
    for start, end in equal_chunks(schedule, spans, 0):
        a, b = spans[start]
        times, noisy = schedule.chunk(start)
        own = draws[:, :, a : spans[end - 1][1]]
        own = rearrange(own, "n b (chunk t) h w c -> chunk n b t h w c", t=b - a)
        t_table = jnp.asarray(np.asarray(times), jnp.promote_types(draws.dtype, jnp.result_type(float)))
        most = len(times) - 1
        steps = jnp.minimum(num_steps, most)

        def body(cache, inputs, t_table=t_table, steps=steps, noisy=noisy, most=most):
            chunk, eps = inputs
            denoise = partial(_denoise, network, fixed, fixed_prompt, cache, chunk)

            def earlier(i, x):
                return next_state(denoise, rf_noisy, x, t_table[i], t_table[i + 1], eps[i + 1])

            x = jax.lax.fori_loop(0, steps - 1, earlier, (t_table[0] * eps[0]).astype(t_table.dtype))
            t = t_table[steps - 1]
            clean = _denoise(network, params, prompt, cache, chunk, x, t)
            x0 = stop_gradient(clean)
            context, t_context = x0, jnp.zeros_like(t)
            if noisy:
                t_context = t_table[most - 1]
                noised = rf_noisy(x0, eps[-1], t_context)
                context = jnp.where(steps == most, x, noised)
            times_B = jnp.broadcast_to(t_context, x.shape[:1])
            return network.append(fixed, context, times_B, fixed_prompt, cache, chunk), (clean, x, t)

        cache, out = jax.lax.scan(body, cache, (jnp.arange(start, end), own))
        groups.append(out)
    return groups, cache


def _gathered(network: CausalDiT, params: Params) -> Params:
    """The weights once for all chunks and steps."""
    return gathered_once(params, network.dit.config.dtype)


def _rolled(network, schedule, spans, params, text, draws, num_steps):
    """((video, inputs), what the backward pass needs of them to run the last steps again)."""
    prompt = network.prompt(params, text)
    groups, cache = _chunks(network, schedule, spans, params, prompt, draws, num_steps)
    videos, inputs, times = zip(*groups, strict=True)
    return (joined(videos), stop_gradient(joined(inputs))), (cache, inputs, times)


def _plain(network, schedule, spans, params, text, draws, num_steps) -> tuple[Latents, Latents]:
    return _rolled(network, schedule, spans, params, text, draws, num_steps)[0]


def _forward(network, schedule, spans, params, text, draws, num_steps):
    """As no derivative is taken of it here, the last steps read what the others do."""
    out, kept = _rolled(network, schedule, spans, _gathered(network, params), text, draws, num_steps)
    return out, (params, text, draws, num_steps, *kept)


def _value(*arguments) -> tuple[Latents, Latents]:
    return _forward(*arguments)[0]


def _backward(network, schedule, spans, residuals, cotangents):
    params, text, draws, num_steps, cache, inputs, times = residuals
    d_video, _ = cotangents
    prompt, prompt_vjp = jax.vjp(network.prompt, params, text)
    total, whole = jax.tree.map(jnp.zeros_like, (params, prompt)), _gathered(network, params)
    for (start, end), x, t in zip(equal_chunks(schedule, spans, 0), inputs, times, strict=True):
        a, b = spans[start]
        d = d_video[:, a : spans[end - 1][1]]
        d = rearrange(d, "b (chunk t) h w c -> chunk b t h w c", t=b - a)

        def body(total, of_chunk):
            chunk, x, t, d = of_chunk
            _, vjp = jax.vjp(lambda p, q: _denoise(network, p, q, cache, chunk, x, t), whole, prompt)
            d_params, d_prompt = vjp(d)
            return jax.tree.map(jnp.add, total, (stay_sharded(d_params), d_prompt)), None

        total, _ = jax.lax.scan(body, total, (jnp.arange(start, end), x, t, d))
    d_params, d_text = prompt_vjp(total[1])
    d_params = jax.tree.map(jnp.add, total[0], d_params)
    return d_params, d_text, jnp.zeros_like(draws), np.zeros(num_steps.shape, jax.dtypes.float0)


_replayed = jax.custom_vjp(_value, nondiff_argnums=(0, 1, 2))
_replayed.defvjp(_forward, _backward)
