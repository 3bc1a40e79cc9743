"""Latents that a teacher samples for prompts: how the published set was made."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rcm_jax.data.prepare.options import NUM_FRAMES, SetOptions
from rcm_jax.data.prepare.prompts import keep_negative, open_prompts
from rcm_jax.data.prepare.sets import Plan, ShardSet, digest_of, key_of
from rcm_jax.data.prepare.text import cut_to_length, features
from rcm_jax.data.sample import Sample
from rcm_jax.errors import ArgumentError
from rcm_jax.pipelines.pipeline import Pipeline, load
from rcm_jax.worlds.wan.negative import PROMPT

# of Wan2.1-14B's set; with noise by (0, KEY), 832x480
PUBLISHED = {
    "sampler": "euler", "num_steps": 100, "guidance_scale": 5.0, "shift": 3.0, "num_frames": NUM_FRAMES,
    "negative_prompt": PROMPT,
}  # fmt: skip


def make_teacher(prompts: Path, options: SetOptions, files: dict[str, Any], sampling: dict[str, Any]) -> str:
    """files: arguments of `load`. sampling: of its call, over the published ones; the built-in world has its own.
    Raises ArgumentError for a network that is no bidirectional text-to-video teacher, and for what does not apply."""
    pipe = load(**files)
    _check_teacher(pipe)
    found = open_prompts(prompts)
    asked = sampling if pipe.world.small else PUBLISHED | sampling
    request, sampler = pipe.request(found.words[:1], **asked), pipe.sampling(**asked)
    dtype = np.dtype(np.float32 if pipe.world.small else ml_dtypes.bfloat16)
    shape = (*request.latent_shape, pipe.info.model.out_channels)
    settings = dataclasses.asdict(sampler) | {
        "teacher": files["dit_path"], "seed": request.seed, "negative_prompt": request.negative_prompts[0],
        "latent_shape": shape,
    }  # fmt: skip
    size_of_one = dtype.itemsize * (int(np.prod(shape)) + pipe.info.model.text_len * pipe.info.model.text_dim)
    plan = Plan("teacher", settings, len(found.words), digest_of(found.words), size_of_one)
    shards = ShardSet(options, plan)
    order = shards.order
    if found.features is None:
        texts = features(pipe.world.encode_text, [found.words[number] for number in order])
    else:
        texts = (found.features(number) for number in order)
    null = pipe.world.encode_text(request.negative_prompts) if order and sampler.guided else None
    length = pipe.info.model.text_len

    def samples(numbers: range) -> Iterator[Sample]:
        together = pipe.request(found.words[: len(numbers)], **asked).batch_size
        for start in range(0, len(numbers), together):
            some = numbers[start : start + together]
            rows = [next(texts) for _ in some]
            read = np.stack([np.pad(row, ((0, length - len(row)), (0, 0))) for row in rows])
            latents = pipe.latents(
                [found.words[number] for number in some], features=(read, null), indices=list(some),
                progress="" if pipe.world.small else "sample", **asked,
            )  # fmt: skip
            for number, one, row in zip(some, latents, rows, strict=True):
                yield Sample(key_of(number), one.astype(dtype), row.astype(dtype), found.words[number])

    told = shards.make(samples, "teacher")
    if null is not None and not pipe.world.small:
        keep_negative(options, lambda _: cut_to_length(null[0])[None], "")
    return told


def _check_teacher(pipe: Pipeline) -> None:
    if pipe.causal:
        raise ArgumentError("{teacher} is a causal network; latents are sampled by a bidirectional one", teacher=None)
    if pipe.info.model.takes_image:
        raise ArgumentError(
            "{teacher} makes videos from an image, and a list of prompts has none: make a set of videos, with {i2v}",
            teacher=None, i2v=None,
        )  # fmt: skip
