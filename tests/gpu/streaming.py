"""Stage 4: streaming of the 1.3B causal network at 480p, random weights: first frame, frames a second, memory.

In the times: the prompt's keys, the network, the decoder, frames on the host. Not: loading, the text encoder,
compilation (a run before), the MP4. "latents only" is without the decoder.
"""

import dataclasses
import functools
import json
import statistics
from collections.abc import Iterator

import numpy as np

from rcm_jax.configs import wan_1_3b_causal_sf_dmd as recipe
from rcm_jax.configs.base import run_config
from rcm_jax.model_file import ModelInfo
from rcm_jax.sampling.stream import Profile, profile
from tests.gpu.parts import Context, Part, peak_gib
from tests.gpu.wan import model, pipeline

RUNS = 2
CASES = (("c3-3", "4step", True), ("c3-3", "2step", True), ("c3-3", "1step", True), ("c1-1", "4step", True),
         ("c3-3", "4step", False))  # fmt: skip


def parts(context: Context) -> Iterator[Part]:
    for pattern, preset, decodes in CASES[1:2] if context.tiny else CASES:
        name = f"{pattern}, {preset}{'' if decodes else ', latents only'}"
        yield Part(name, functools.partial(one_case, pattern, preset, decodes, context.tiny))


def one_case(pattern: str, preset: str, decodes: bool, tiny: bool) -> dict:
    config = run_config(recipe.get_config(f"{pattern},{preset}"))
    shape = (6, 4, 8) if tiny else config.data.latent_shape
    causal = json.loads(json.dumps(dataclasses.asdict(config.causal)))
    info = ModelInfo(model(tiny), "student", "wan", shape, sigma_max=config.sigma_max, causal=causal)
    pipe = pipeline(info, tiny=tiny, decodes=decodes)
    stream = pipe.stream()
    profile(lambda: stream)  # compiles
    runs: list[Profile] = []
    for _ in range(1 if tiny else RUNS):
        frames, run = profile(lambda: stream)
        runs.append(run)
    video = np.concatenate(frames, axis=1)
    expected = pipe.world.num_frames(shape[0]) if decodes else shape[0]
    frames_a_latent = 1 if decodes else pipe.world.vae.config.time
    return {
        "ok": video.shape[1] == expected, "frames": video.shape[1],
        "first frame s": statistics.median(run.first for run in runs),
        "a chunk s": statistics.median(run.chunk for run in runs),
        "frames/s": frames_a_latent * statistics.median(run.rate for run in runs), "peak GiB": peak_gib(),
    }  # fmt: skip
