"""Golden checks of quantised keys and values: every byte that is stored, and what comes back."""

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.quant import CacheQuant, QuantConfig, Stored, restore, restore_float32, smoothing, store
from tests.golden_common import Case, Check

RENAMED = {"dtype_name": "dtype", "scale_granularity": "granularity"}
BFLOAT16_STEP = 2.0**-7  # of a number in [1, 2), so at most this share of any
UNROUNDED = 1e-5


def config_of(settings: dict) -> QuantConfig:
    return QuantConfig(**{RENAMED.get(name, name): value for name, value in settings.items()})


def _bytes(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


def _numbers(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))


def _payload(stored: Stored) -> np.ndarray:
    match stored.config.dtype:
        case "bf16":
            return _numbers(stored.payload)
        case "fp8":
            return _bytes(stored.payload)
    return np.asarray(stored.payload)


def _near(name: str, got: jax.Array, want: np.ndarray) -> Check:
    """Within one step of bfloat16."""
    return Check(name, _numbers(got), want, max_abs=np.maximum(np.abs(want) * BFLOAT16_STEP, 1e-30))


def _smoothing_checks(stored: Stored, warm, x: np.ndarray, want) -> list[Check]:
    config, undo = stored.config, stored.undo
    match config.smoothing:
        case "clip":
            return [_near("threshold", smoothing.clip_threshold(x, config.clip_percentile), want["threshold"])]
        case "balance":
            return [_near("channel_scale", undo, want["channel_scale"])]
        case "reorder":
            places = np.asarray(undo)[:, 0]
            return [
                Check("perm", np.argsort(places, axis=-1), want["perm"], exact=True),
                Check("inv_perm", places, want["inv_perm"], exact=True),
            ]
        case "qvg":
            names = {f"stage{i}_centroids": c.centroids for i, c in enumerate(undo)}
            names |= {f"warm{i}_centers": centre for i, centre in enumerate(warm)}
            indices = {f"stage{i}_assignments": c.assignments for i, c in enumerate(undo)}
            return [_near(name, got, want[name]) for name, got in names.items()] + [
                Check(name, np.asarray(got), want[name], exact=True) for name, got in indices.items()
            ]
    return []


def _checks(prefix: str, stored: Stored, warm, x: np.ndarray, case: Case) -> list[Check]:
    want = {n.removeprefix(prefix): value for n, value in case.outputs.items() if n.startswith(prefix)}
    checks = [
        Check("payload", _payload(stored), want["payload"], exact=True),
        Check("restored", _numbers(jax.jit(restore)(stored)), want["restored"], exact=True),
        Check("restored_unrounded", jax.jit(restore_float32)(stored), want["restored_unrounded"], max_abs=UNROUNDED),
        *_smoothing_checks(stored, warm, x, want),
    ]
    if stored.scale is not None:
        checks.append(Check("scale_bytes", _bytes(stored.scale), want["scale_bytes"], exact=True))
        checks.append(Check("scale", _numbers(stored.scale), want["scale"], exact=True))
    return [Check(prefix + c.name, c.got, c.want, c.rel, c.max_abs, c.exact) for c in checks]


def kv_quant(case: Case) -> list[Check]:
    quant = CacheQuant(config_of(case.config["key"]), config_of(case.config["value"]))
    put = jax.jit(store, static_argnums=1)
    checks = []
    for name, config in (("k", quant.keys), ("v", quant.values)):
        warm = ()
        for chunk in range(case.config["n_chunks"]):
            x = case.inputs[f"{name}_chunk{chunk}"]
            stored, warm = put(x, config, warm)
            checks += _checks(f"{name}_chunk{chunk}_", stored, warm, x, case)
    return checks


CASES = {"kv_quant": kv_quant}
