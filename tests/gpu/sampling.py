"""Stage 6: 77 frames of 832 x 480 from the 1.3B, random weights, in 4, 2 and 1 steps; decoding apart."""

import functools
import time
from collections.abc import Iterator

from rcm_jax.configs import wan_1_3b_rcm as recipe
from rcm_jax.model_file import ModelInfo
from rcm_jax.pipelines.pipeline import Pipeline
from tests.gpu.parts import Context, Part, peak_gib
from tests.gpu.wan import model, pipeline


def parts(context: Context) -> Iterator[Part]:
    """The pipeline is opened once, when the first part that is missing begins."""
    pipe = functools.cache(lambda: open_pipeline(context.tiny))
    for steps in (2,) if context.tiny else (4, 2, 1):
        yield Part(f"{steps} steps", lambda steps=steps: one_video(pipe(), steps))


def open_pipeline(tiny: bool) -> Pipeline:
    config = recipe.get_config()
    shape = (3, 4, 8) if tiny else tuple(config.data.latent_shape)
    info = ModelInfo(model(tiny), "student", "wan", shape, sigma_max=config.sigma_max)
    return pipeline(info, tiny=tiny)


def one_video(pipe: Pipeline, steps: int) -> dict:
    """Times of the second of two videos: the first compiles."""
    frames = pipe.world.num_frames(pipe.info.latent_shape[0])
    for seed in (0, 1):
        began, at = time.perf_counter(), []
        (video,) = pipe(
            num_steps=steps, seed=seed, num_frames=frames, progress="",
            on_step=lambda *_, at=at: at.append(time.perf_counter()),
        )  # fmt: skip
        ended = time.perf_counter()
    times = [b - a for a, b in zip([began, *at], at, strict=False)]
    return {
        "ok": len(video.frames) == frames and len(at) == steps, "frames": len(video.frames),
        "latents s": at[-1] - began, "a step s": min(times), "decoding s": ended - at[-1], "whole s": ended - began,
        "peak GiB": peak_gib(),
    }  # fmt: skip
