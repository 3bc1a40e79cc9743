"""Golden checks of the causal network: its masks, both training forms, the cache, and the sampler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkPattern
from rcm_jax.convert.dit import from_wan
from rcm_jax.kernels.masks import KeyRuns, dense
from rcm_jax.model_file import ModelInfo
from rcm_jax.pipelines.options import SamplingOptions
from rcm_jax.pipelines.settings import schedule_from
from rcm_jax.sampling.rollout import given_noises, rollout
from rcm_jax.sampling.schedules import RolloutSchedule
from rcm_jax.wan.dit import MODEL_TIME, DiT, velocity
from rcm_jax.wan.rope import apply_rope
from tests.golden_common import Case, Check, channels_first, channels_last
from tests.golden_networks import dit_config


def network(config: dict) -> CausalDiT:
    """The causal network of a golden config."""
    pattern = ChunkPattern(config["first_chunk_t"], config["chunk_t"])
    window, sink = config.get("local_attn_blocks"), config.get("sink_blocks", 0)
    return CausalDiT(
        DiT(dit_config(config)), pattern, config["latent"][0], tuple(config["latent"][1:]), window=window, sink=sink
    )  # fmt: skip


def both_halves(causal: CausalDiT, params, text, x0, t_clean, x_t, t):
    """v of [clean | noisy], as the published code returns it: the clean half sees itself alone."""
    clean = causal.velocity(params, text)(x0, t_clean)
    return jnp.concatenate([clean, causal.forced_velocity(params, text, x0, t_clean)(x_t, t)], axis=1)


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
    got = {
        "v_block_causal": jax.jit(causal.velocity(params, text))(x_t, t),
        "v_bidirectional": jax.jit(velocity(causal.dit, params, text))(x_t, t),
        "v_teacher_forcing": jax.jit(functools.partial(both_halves, causal, params, text))(x0, t_clean, x_t, t),
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


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("mask",))
@dataclasses.dataclass(frozen=True)
class _Keeping:
    """No past, and all of the video's own keys kept."""

    mask: KeyRuns

    def attend(self, attend, q, own, rope, layer):
        own = own.turned(rope)
        return attend(apply_rope(q, rope), *own, mask=self.mask), own


def _all_keys(causal: CausalDiT, params, text, x0, t_clean):
    """The keys and values of the clean video: those of the block-causal pass, which the cache keeps a window of."""
    T = x0.shape[1]
    _, own = causal.dit.apply(
        {"params": params}, x0, MODEL_TIME * t_clean, text, past=_Keeping(causal.mask(T)), frames=jnp.arange(T),
        method="chunk",
    )  # fmt: skip
    return own


def dit_causal_jvp(case: Case) -> list[Check]:
    causal, config = network(case.config), dit_config(case.config)
    params, text = from_wan(case.weights, config), case.inputs["crossattn_emb"]
    x0, x_t, t_x = (channels_last(case.inputs[name]) for name in ("x0", "xt", "t_xt"))
    t, t_t = (_rf_time(case.inputs[name]) for name in ("t_noisy", "t_t_noisy"))
    T = x0.shape[1]

    @jax.jit
    def both(t_x, t_t):
        v = functools.partial(both_halves, causal, params, text, x0, jnp.zeros_like(t))
        return jax.jvp(v, (x_t, t), (t_x, t_t))

    primal, tangent = both(t_x, t_t)
    assert not np.asarray(tangent[:, :T]).any()
    return [
        Check("primal", channels_first(primal), case.outputs["primal"], rel=5e-6),
        Check("tangent", channels_first(tangent), case.outputs["tangent"], rel=1e-5, max_abs=2e-4),
    ]


class Recorded(CausalDiT):
    """Notes every call of the network while it runs: (chunk, model time, 1 for a call that fills the cache)."""

    def _note(self, t, chunk, fills: int) -> None:
        def write(chunk, t):
            CALLS.append((int(chunk), MODEL_TIME * float(t), fills))

        jax.debug.callback(write, chunk, t[0], ordered=True)

    def denoise(self, params, x, t, prompt, cache, chunk):
        self._note(t, chunk, 0)
        return super().denoise(params, x, t, prompt, cache, chunk)

    def append(self, params, x, t, prompt, cache, chunk):
        return self.step(params, x, t, prompt, cache, chunk)[1]

    def step(self, params, x, t, prompt, cache, chunk):
        self._note(t, chunk, 1)
        return super().step(params, x, t, prompt, cache, chunk)


CALLS: list[tuple[int, float, int]] = []


def schedule_of(config: dict, image: bool = False) -> RolloutSchedule:
    """As a pipeline settles it from a call's options."""
    student = dict(
        num_steps=config["num_steps"], mid_t=config["mid_t"], steps_per_chunk=config.get("steps_per_chunk"),
        mid_t_schedules=config.get("mid_t_schedules"), context_from_last_step=config.get("context_from_last_step"),
        context_from_last_step_start_chunk=config.get("context_start_chunk"),
    )  # fmt: skip
    teacher = dict(num_steps=config["num_steps"], shift=config.get("shift"), guidance_scale=config["guidance"])
    asked = SamplingOptions(
        sigma_max=config["sigma_max"], image_path="given" if image else None,
        **(teacher if config["ode"] else student),
    )  # fmt: skip
    info = ModelInfo(None, "teacher" if config["ode"] else "student", "wan", causal={"pattern": "c1-1"})
    return schedule_from(asked, info)


def sampler_causal(case: Case) -> list[Check]:
    config, image = case.config, case.inputs.get("image_latent")
    sizes = config | {"latent": [config["latent"][0] + (image is not None), *config["latent"][1:]]}
    causal = Recorded(*(getattr(network(sizes), f.name) for f in dataclasses.fields(CausalDiT)))
    params = from_wan(case.weights, dit_config(config))
    start = channels_last(case.inputs["noise"])
    if image is not None:  # the file has no start for the image's frame, which needs none
        image = channels_last(image)
        start = np.concatenate([np.zeros_like(image), start], axis=1)
    steps = [channels_last(case.inputs[f"step_noise_{i}"]) for i in range(config.get("n_step_noises", 0))]
    noises = given_noises(jnp.asarray(np.stack([start, *steps])), causal.pattern)
    uncond = case.inputs.get("uncond_emb")
    schedule = schedule_of(config, image is not None)
    CALLS.clear()
    samples = jax.jit(
        lambda params: rollout(
            causal,
            params,
            case.inputs["crossattn_emb"],
            noises,
            schedule,
            frames=causal.frames,
            null_text=uncond,
            image=image,
        )
    )(params)
    jax.effects_barrier()
    limits = {"rel": 5e-6, "max_abs": 5e-5}
    checks = [
        Check("samples", channels_first(samples), case.outputs["samples"], **limits),
        Check("net_calls_f64", np.array(CALLS), case.outputs["net_calls_f64"], **limits),
        Check("t_steps_f64", schedule.chunk(0)[0], case.outputs["t_steps_f64"], rel=1e-12),
    ]
    per_chunk = [name for name in case.outputs if name.startswith("t_steps_chunk")]
    for name in per_chunk:
        times, _ = schedule.chunk(int(name.removeprefix("t_steps_chunk").removesuffix("_f64")))
        checks.append(Check(name, times, case.outputs[name], rel=1e-12))
    return checks


CASES = {"dit_causal": dit_causal, "dit_causal_jvp": dit_causal_jvp, "sampler_causal": sampler_causal}
