"""Golden checks of the causal network: its masks, both training forms, and the cache."""

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.chunks import ChunkPattern
from rcm_jax.convert.dit import from_wan
from rcm_jax.kernels.masks import KeyRuns, dense
from rcm_jax.wan.causal import CausalDiT, pack
from rcm_jax.wan.dit import MODEL_TIME, DiT, velocity
from tests.golden_common import Case, Check, channels_first, channels_last
from tests.golden_networks import dit_config


def network(config: dict) -> CausalDiT:
    """The causal network of a golden config."""
    pattern = ChunkPattern(config["first_chunk_t"], config["chunk_t"])
    window, sink = config.get("local_attn_blocks"), config.get("sink_blocks", 0)
    return CausalDiT(
        DiT(dit_config(config)), pattern, config["latent"][0], tuple(config["latent"][1:]), window=window, sink=sink
    )  # fmt: skip


def packed_velocity(causal: CausalDiT, params, text, frames: int):
    """(full [B, 2T …], times [B, 2T]) -> v of both halves, as the published code returns it."""
    mask, positions = causal.forcing_mask(frames), np.tile(np.arange(frames), 2)
    return lambda x, t: causal.dit.apply({"params": params}, x, MODEL_TIME * t, text, mask=mask, frames=positions)


def _rf_time(t: np.ndarray) -> jax.Array:
    """Model time to RF time, in float64: times 1000 it must be the file's number again."""
    return jnp.asarray(t, jnp.float64) / MODEL_TIME


def _mask(mask: KeyRuns) -> np.ndarray:
    size = mask.query_ends[-1]
    return np.asarray(dense(mask, size, size)).astype(np.uint8)


def dit_causal(case: Case) -> list[Check]:
    causal, config = network(case.config), dit_config(case.config)
    params, text = from_wan(case.weights, config), case.inputs["crossattn_emb"]
    x0, x_t = (channels_last(case.inputs[name]) for name in ("x0", "xt"))
    t_clean, t = (_rf_time(case.inputs[name]) for name in ("t_clean", "t_noisy"))
    T = x0.shape[1]

    @jax.jit
    def rollout(params):
        prompt, cache = causal.prompt(params, text), causal.init_cache(x0.shape[0])
        noisy, clean = [], []
        for i, (a, b) in enumerate(causal.pattern.spans(T)):
            noisy.append(causal.denoise(params, x_t[:, a:b], t[:, a], prompt, cache, i))
            v, cache = causal.step(params, x0[:, a:b], t_clean[:, a], prompt, cache, i)
            clean.append(v)
        return jnp.concatenate(noisy, 1), jnp.concatenate(clean, 1), cache

    noisy, clean, cache = rollout(params)
    full, times = pack(x0, x_t, t, t_clean)
    got = {
        "v_block_causal": jax.jit(causal.velocity(params, text))(x_t, t),
        "v_bidirectional": jax.jit(velocity(causal.dit, params, text))(x_t, t),
        "v_teacher_forcing": jax.jit(packed_velocity(causal, params, text, T))(full, times),
        "v_kv_noisy": noisy,
        "v_kv_clean": clean,
    }
    limits = {"rel": 5e-6, "max_abs": 5e-5}
    checks = [Check(name, channels_first(v), case.outputs[name], **limits) for name, v in got.items()]
    whole = cache
    if causal.window is not None:  # the file's cache holds every chunk: fill one as large, under the same window
        whole = _all_keys(causal, params, text, x0, t_clean)
    checks += [Check(f"kv_{n}_layer0", getattr(whole, n)[0], case.outputs[f"kv_{n}_layer0"], **limits) for n in "kv"]
    masks = {"mask_block_causal": causal.mask(T), "mask_teacher_forcing": causal.forcing_mask(T)}
    return checks + [Check(name, _mask(mask), case.outputs[name], exact=True) for name, mask in masks.items()]


def _all_keys(causal: CausalDiT, params, text, x0, t_clean):
    """The keys and values of the clean video: those of the block-causal pass, which the cache keeps a window of."""
    tokens = x0.shape[1] * causal.frame_tokens
    empty = jax.tree.map(
        lambda b: jnp.zeros((*b.shape[:2], tokens, *b.shape[3:]), b.dtype), causal.init_cache(x0.shape[0])
    )
    _, own = causal.dit.apply(
        {"params": params}, x0, MODEL_TIME * t_clean, text, past=empty, slot=jnp.int32(0),
        mask=causal.mask(x0.shape[1]), frames=jnp.arange(x0.shape[1]), method="chunk",
    )  # fmt: skip
    return own


def dit_causal_jvp(case: Case) -> list[Check]:
    causal, config = network(case.config), dit_config(case.config)
    params, text = from_wan(case.weights, config), case.inputs["crossattn_emb"]
    x0, x_t, t_x = (channels_last(case.inputs[name]) for name in ("x0", "xt", "t_xt"))
    t, t_t = (_rf_time(case.inputs[name]) for name in ("t_noisy", "t_t_noisy"))
    T = x0.shape[1]
    v = packed_velocity(causal, params, text, T)

    @jax.jit
    def both(t_x, t_t):
        return jax.jvp(lambda x, t: v(*pack(x0, x, t, None)), (x_t, t), (t_x, t_t))

    primal, tangent = both(t_x, t_t)
    assert not np.asarray(tangent[:, :T]).any()
    return [
        Check("primal", channels_first(primal), case.outputs["primal"], rel=5e-6),
        Check("tangent", channels_first(tangent), case.outputs["tangent"], rel=1e-5, max_abs=2e-4),
    ]


CASES = {"dit_causal": dit_causal, "dit_causal_jvp": dit_causal_jvp}
