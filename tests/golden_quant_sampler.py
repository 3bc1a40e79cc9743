"""Golden checks of the causal sampler on a quantised cache: its videos, the bytes it keeps, and what comes back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.causal.blobs import Blobs, restored
from rcm_jax.causal.cache import Ring
from rcm_jax.causal.quantised import quantised
from rcm_jax.convert.dit import from_wan
from rcm_jax.quant import CacheQuant, Stored, laid_by_token
from rcm_jax.quant.codes import BITS, FLOAT8, unpack
from rcm_jax.quant.groups import group_shape
from rcm_jax.sampling.rollout import given_noises, open_branches, sample_chunk
from tests.golden_causal import network, schedule_of
from tests.golden_common import Case, Check, channels_first, channels_last
from tests.golden_networks import dit_config
from tests.golden_quant import config_of

LIMITS = {"rel": 5e-6, "max_abs": 5e-5}
STEPS = 2.0**-7  # of bfloat16 to a number, and of a payload that is one


def _numbers(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))


def _of_chunk(slots, chunk: int) -> Blobs:
    """The chunk's blobs as they lie, no slot and parts."""
    blobs, slot = (slots.first, 0) if slots.first is not None and chunk == 0 else (slots.rest, chunk)
    slot -= slots.first is not None and chunk > 0
    return jax.tree.map(lambda x: x[:, slot, 0, 0], blobs)


def _stored_checks(name: str, stored: Stored, case: Case) -> list[Check]:
    """Of the first layer."""
    one, dtype = jax.tree.map(lambda x: x[0], stored), stored.config.dtype
    want = case.outputs[f"{name}_payload"]
    if dtype == "bf16":
        return [Check(f"{name}_payload", _numbers(one.payload), want, max_abs=np.abs(want) * STEPS)]
    scale = case.outputs[f"{name}_scale"]
    if one.by_token:
        given = jnp.asarray(want.view(FLOAT8) if dtype == "fp8" else want), jnp.asarray(scale).astype(FLOAT8)
        same = laid_by_token(dataclasses.replace(one, payload=given[0], scale=given[1], by_token=False))
        want, scale = _bytes(same.payload), _numbers(same.scale)
    payload = _bytes(one.payload)
    if dtype in BITS and not one.by_token:
        # codes of a group without a scale stand for nothing: a token alone in its cluster leaves noise
        payload, want = (np.where(scale, unpack(x, BITS[dtype], _groups(one)), 0) for x in (payload, want))
    return [
        Check(f"{name}_payload", payload, want, exact=True),
        Check(f"{name}_scale", _numbers(one.scale), scale, exact=True),
    ]


def _bytes(x: jax.Array) -> np.ndarray:
    x = np.asarray(x)
    return x.view(np.uint8) if x.dtype == FLOAT8 else x


def _groups(stored: Stored) -> tuple[int, int, int]:
    return group_shape(stored.shape, stored.config.granularity, stored.config.group_size)


def sampler_causal_quant(case: Case) -> list[Check]:
    config = case.config
    quant = CacheQuant(config_of(config["key"]), config_of(config["value"]), config["pre_rope_keys"])
    causal = dataclasses.replace(network(config), policy=quantised(Ring(), quant))
    params = from_wan(case.weights, dit_config(config))
    start = channels_last(case.inputs["noise"])
    steps = [channels_last(case.inputs[f"step_noise_{i}"]) for i in range(config["n_step_noises"])]
    noises = given_noises(jnp.asarray(np.stack([start, *steps])), causal.pattern)
    schedule, spans = schedule_of(config), causal.pattern.spans(causal.frames)
    times, noisy = schedule.chunk(0)

    @jax.jit
    def make(params):
        branches = open_branches(causal, params, jnp.asarray(case.inputs["crossattn_emb"]), None, schedule)
        parts = []
        for i, (a, b) in enumerate(spans):
            x, branches = sample_chunk(
                causal, params, branches, jnp.int32(i), noises(i, b - a), times, noisy_context=noisy
            )  # fmt: skip
            parts.append(x)
        return jnp.concatenate(parts, axis=1), branches[0].cache

    samples, slots = make(params)
    checks = [
        Check("samples", channels_first(samples), case.outputs["samples"], **LIMITS),
        Check("t_steps_f64", times, case.outputs["t_steps_f64"], rel=1e-12),
    ]
    kept = [blobs for blobs in slots[:2] if blobs is not None]
    for layer in range(config["num_layers"]):
        back = [restored(blobs, layer, jnp.float32) for blobs in kept]
        for n in "kv":
            want = case.outputs[f"kv_{n}_layer{layer}"]
            got = np.concatenate([np.asarray(getattr(x, n)) for x in back], axis=1)
            checks.append(Check(f"kv_{n}_layer{layer}", got, want, max_abs=np.abs(want) * STEPS))
    for chunk in range(2):
        for n, stored in zip("kv", _of_chunk(slots, chunk), strict=True):
            checks += _stored_checks(f"layer0_chunk{chunk}_{n}", stored, case)
    return checks


CASES = {"sampler_causal_quant": sampler_causal_quant}
