"""Golden checks of video to video; run under `jax_enable_x64`, as the public code counts noise levels in float64."""

import jax
import numpy as np

from rcm_jax.sampling.noise_control import first_motion, next_motion, published_time
from tests.golden_common import Case, Check, channels_last


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


CASES = {"v2v_noise_controller": v2v_noise_controller}
