"""Golden checks of what a causal sampler keeps of its past: the cache policies, past the trained horizon."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.causal.cache import Ring
from rcm_jax.causal.network import CausalDiT
from rcm_jax.causal.policies import policy_of
from rcm_jax.chunks import ChunkPattern
from rcm_jax.convert.dit import from_wan
from rcm_jax.sampling.rollout import given_noises, open_branches, sample_chunk
from rcm_jax.wan.dit import MODEL_TIME, DiT
from rcm_jax.wan.rope import apply_rope
from tests.golden_causal import network, schedule_of
from tests.golden_common import Case, Check, channels_first, channels_last
from tests.golden_networks import dit_config

KEPT: list[tuple[int, np.ndarray]] = []


def _noting(policy):
    """The policy, which notes the tokens that it chooses: (chunk, [B, tokens]) for every layer of a compaction."""

    class Noting(type(policy)):
        def kept(self, layer, tokens, chunk):
            del layer
            jax.debug.callback(lambda c, t: KEPT.append((int(c), np.asarray(t))), chunk, tokens, ordered=True)

    return Noting(**{f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)})


class _Table:
    """Which latent frames a policy holds, in the order they came, while a video grows: of a ring from where it writes,
    of others from their cache."""

    def __init__(self, policy, geometry):
        self.policy, self.geometry, self.frames = policy, geometry, {}

    def positions(self, cache, chunk):
        """Where the held frames are while the chunk is made; None where that is in the keys."""
        if isinstance(self.policy, Ring):
            return np.array(sorted(self._held(chunk)))
        if not hasattr(self.policy, "cached_positions"):
            return np.arange(int(cache.frames))
        at = jax.jit(lambda cache: self.policy.cached_positions(self.geometry, cache, jnp.int32(chunk)))(cache)
        return at[: int(cache.frames)]

    def append(self, chunk, span):
        if isinstance(self.policy, Ring):
            slot = int(self.policy.slot(self.geometry, chunk)) // self.geometry.frame_tokens
            self.frames |= {slot + j: f for j, f in enumerate(range(*span))}
            if self.policy._leaves_head(self.geometry) and chunk == self.policy.window - 1:
                head = self.policy.head_frames(self.geometry)
                self.frames = {slot - head: f for slot, f in self.frames.items()}

    def _held(self, chunk):
        filled = int(self.policy._filled(self.geometry, chunk)) // self.geometry.frame_tokens
        return [self.frames[slot] for slot in range(filled)]

    def ordered(self, cache, chunks):
        """The keys and values that are held in the end, oldest first, before RoPE where the policy can tell."""
        P = self.geometry.frame_tokens
        if not isinstance(self.policy, Ring):
            return type(cache.keys)(*(x[:, :, : int(cache.frames) * P] for x in cache.keys))
        held = np.array(self._held(chunks))
        tokens = (np.argsort(held)[:, None] * P + np.arange(P)).ravel()
        k, v = (x[:, :, tokens] for x in cache)
        cos, sin = self.geometry.rope(np.sort(held))
        return type(cache)(jnp.stack([apply_rope(layer, (cos, -sin)) for layer in k]), v)


def sampler_causal_extrapolation(case: Case) -> list[Check]:
    config = case.config
    scenes = config.get("scene_schedule", [])
    cuts = {"cuts": tuple(i for i, (_, cut) in enumerate(scenes) if cut)} if scenes else {}
    policy = _noting(policy_of(config["policy"], **config["policy_config"], **cuts))
    causal = dataclasses.replace(network(config), policy=policy)
    params = from_wan(case.weights, dit_config(config))
    start = channels_last(case.inputs["noise"])
    steps = [channels_last(case.inputs[f"step_noise_{i}"]) for i in range(config["n_step_noises"])]
    noises = given_noises(jnp.asarray(np.stack([start, *steps])), causal.pattern)
    texts = [case.inputs[f"crossattn_emb_seg{i}"] for i in range(config.get("n_segments", 0))]
    schedule = schedule_of(config)
    spans = causal.pattern.spans(causal.frames)
    KEPT.clear()

    def one(size: int):
        @jax.jit
        def make(params, branches, chunk):
            (branch,) = branches
            times, noisy = schedule.chunk(0)
            at = policy.positions(causal.geometry, branch.cache, chunk, size)
            draws = noises(chunk, size)
            return *sample_chunk(causal, params, branches, chunk, draws, times, noisy_context=noisy), at

        return make

    make = {size: one(size) for size in {b - a for a, b in spans}}
    prompts = [causal.prompt(params, jnp.asarray(text)) for text in texts]
    text = jnp.asarray(texts[0] if texts else case.inputs["crossattn_emb"])
    branches = open_branches(causal, params, text, None, schedule)
    parts, queries, cached, lengths, table = [], [], [], [], _Table(policy, causal.geometry)
    for i, (a, b) in enumerate(spans):
        if scenes:
            branches = tuple(dataclasses.replace(b, prompt=prompts[scenes[i][0]]) for b in branches)
        cached.append(table.positions(branches[0].cache, i))
        x, branches, at = make[b - a](params, branches, jnp.int32(i))
        parts.append(x)
        queries.append(at)
        table.append(i, (a, b))
        lengths.append(len(table.positions(branches[0].cache, i + 1)) * causal.frame_tokens)
    jax.effects_barrier()
    cache = table.ordered(branches[0].cache, len(spans))
    limits = {"rel": 5e-6, "max_abs": 5e-5}
    checks = [
        Check("samples", channels_first(jnp.concatenate(parts, axis=1)), case.outputs["samples"], **limits),
        Check("positions_q", _padded(queries, case.outputs["positions_q"]), case.outputs["positions_q"], exact=True),
        Check("cache_len", np.array(lengths), case.outputs["cache_len"], exact=True),
        Check("t_steps_f64", schedule.chunk(0)[0], case.outputs["t_steps_f64"], rel=1e-12),
    ]
    for n in "kv":
        for layer in range(config["num_layers"]):
            name = f"kv_{n}_layer{layer}"
            checks.append(Check(name, getattr(cache, n)[layer], case.outputs[name], **limits))
    if "positions_k" in case.outputs:
        want = case.outputs["positions_k"]
        checks.append(Check("positions_k", _padded(cached, want), want, exact=True))
    if "keep" in case.outputs:
        layers = config["num_layers"]
        kept = np.stack([tokens for _, tokens in KEPT]).reshape(-1, layers, *KEPT[0][1].shape)
        checks.append(Check("keep", kept, case.outputs["keep"], exact=True))
        chunks = np.array([chunk for chunk, _ in KEPT[::layers]])
        checks.append(Check("keep_chunks", chunks, case.outputs["keep_chunks"], exact=True))
    return checks


def _padded(rows: list, like: np.ndarray) -> np.ndarray:
    """Rows of one length, filled with -1."""
    return np.stack([np.pad(np.asarray(r), (0, like.shape[1] - len(r)), constant_values=-1) for r in rows])


def kv_recache(case: Case) -> list[Check]:
    """Of what the file's cache holds we keep what the next chunk sees: not the oldest frames behind the sink."""
    config = case.config
    chunk, local, sink = (config[name] for name in ("chunk_t", "local_frames", "sink_frames"))
    size, at = tuple(config["latent"][1:]), config["switch_frame"]
    dit, pattern = DiT(dit_config(config)), ChunkPattern(config["first_chunk_t"], chunk)
    causal = CausalDiT(dit, pattern, config["latent"][0], size, (local - sink) // chunk, sink // chunk)
    params, x0 = from_wan(case.weights, dit_config(config)), jnp.asarray(channels_last(case.inputs["x0"]))
    old, new = (causal.prompt(params, jnp.asarray(case.inputs[f"crossattn_emb_{n}"])) for n in "ab")
    append = jax.jit(lambda x, cache, i: causal.append(params, x, jnp.zeros(1), old, cache, i))
    cache, spans = causal.init_cache(1), pattern.spans(at)
    for i, (a, b) in enumerate(spans):
        cache = append(x0[:, a:b], cache, jnp.int32(i))
    frames = causal.renewed_frames(len(spans))
    index, whole = (len(spans), True) if frames == at else (jnp.int32(len(spans)), False)
    caches = {"before": cache}
    for name, keep_sink in (("new_sink", False), ("global_sink", True)):
        caches[name] = jax.jit(
            lambda cache, keep=keep_sink: causal.renew(
                params, x0[:, at - frames : at], new, cache, index, keep_sink=keep, whole=whole
            )
        )(cache)
    P = causal.frame_tokens
    held = min(at, local) * P
    stays = np.r_[0 : sink * P, held - (min(at, local - chunk) - sink) * P : held]
    limits, checks = {"rel": 5e-6, "max_abs": 5e-5}, []
    x, t = jnp.asarray(channels_last(case.inputs["noisy_next"])), jnp.full(1, config["t_next"] / MODEL_TIME)
    for name, cache in caches.items():
        for n, layer in ((n, layer) for n in "kv" for layer in range(config["num_layers"])):
            key = f"{name}_{n}_layer{layer}"
            got = getattr(cache, n)[layer, :, : len(stays)]
            checks.append(Check(key, got, case.outputs[key][:, stays], **limits))
        if name != "before":
            v = jax.jit(lambda cache: causal.denoise(params, x, t, new, cache, jnp.int32(len(spans))))(cache)
            checks.append(Check(f"{name}_v_next", channels_first(v), case.outputs[f"{name}_v_next"], **limits))
    return checks


CASES = {"sampler_causal_extrapolation": sampler_causal_extrapolation, "kv_recache": kv_recache}
