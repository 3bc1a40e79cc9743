"""Golden checks of video to video; run under `jax_enable_x64`, as the public code counts noise levels in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.causal.network import CausalDiT
from rcm_jax.causal.slots import SlotRing
from rcm_jax.chunks import ChunkPattern
from rcm_jax.convert.dit import from_wan
from rcm_jax.flow import rf_noisy
from rcm_jax.sampling.noise_control import first_motion, next_motion, published_levels, published_time
from rcm_jax.sampling.stream_batch import Coming, StreamBatch, in_turn, rows_after, tick
from rcm_jax.wan.dit import DiT
from tests.golden_common import Case, Check, channels_first, channels_last
from tests.golden_networks import dit_config


def v2v_noise_controller(case: Case) -> list[Check]:
    """The first chunk, one frame longer, has the level that is given and no output."""
    video, size = channels_last(case.inputs["video"]), case.config["chunk_frames"]
    scale = case.config["noise_scale"]
    step = jax.jit(lambda frames, before: next_motion(scale, frames, before))
    now, levels = first_motion(scale, video[:, : 1 + size]), []
    for start in range(1 + size, video.shape[1], size):
        now = step(video[:, start : start + size], now)
        levels.append(now.level)
    levels = np.asarray(levels)
    first = np.rint(1000 * np.asarray(jax.vmap(published_time)(levels))).astype(np.int64)
    return [
        Check("noise_scale_f64", levels, case.outputs["noise_scale_f64"], max_abs=1e-6),
        Check("first_step", first, case.outputs["first_step"], exact=True),
    ]


def v2v_stream(case: Case) -> list[Check]:
    """Every tick, and the rows' caches at the end. Fresh noise has the rows in its leading axis, or is of one chunk."""
    config, steps = case.config, len(case.config["steps"])
    frames, *size = config["latent"]
    dit = DiT(dit_config(config))
    names = "num_kv_cache", "num_sink_frames", "adapt_sink_threshold"
    ring = SlotRing(*(config[name] for name in names))
    how = StreamBatch(CausalDiT(dit, ChunkPattern(2, 1), frames, tuple(size)), ring, steps)
    params = from_wan(case.weights, dit.config)
    prompt = how.network.prompt(params, case.inputs["crossattn_emb"])
    latents, noise = (channels_last(case.inputs[name]) for name in ("latents", "noise"))

    def coming(which: slice, scale: float, first: int) -> Coming:
        times = jnp.asarray([first, *config["steps"][1:], 0], jnp.float64) / 1000
        return Coming(rf_noisy(latents[:, which], noise[:, which], jnp.float64(scale)), times, published_levels(times))

    begin = coming(slice(0, 2), config["noise_scale"], config["steps"][0])
    renoise = [np.moveaxis(case.inputs[f"renoise_first_{i}"], 1, -1)[None] for i in range(steps - 1)]
    first, cache = in_turn(how, params, prompt, how.open(1), begin, jnp.int32(0), np.stack(renoise))
    rows, finished = rows_after(how, cache, begin), []
    chunks = zip(config["chunk_scales"], config["chunk_steps"], case.inputs["renoise"], strict=True)
    for i, (scale, time, eps) in enumerate(chunks):
        begin, eps = coming(slice(2 + i, 3 + i), scale, time), np.moveaxis(eps, 1, -1)[:, None, None]
        x, rows = tick(how, params, prompt, rows, begin, jnp.int32(2 + i), eps)
        finished.append(x)
    limits = {"rel": 5e-6, "max_abs": 5e-5}
    made = jnp.concatenate(finished[steps - 1 :], axis=1)
    checks = [
        Check("first", channels_first(first), case.outputs["first"], **limits),
        Check("finished", channels_first(made), case.outputs["finished"], **limits),
    ]
    for name, stored in zip("kv", rows.cache.keys, strict=True):
        for layer, keys in enumerate(stored):
            output = f"kv_{name}_layer{layer}"
            checks.append(Check(output, keys, case.outputs[output], **limits))
    return checks


CASES = {"v2v_noise_controller": v2v_noise_controller, "v2v_stream": v2v_stream}
