"""Shards out of a folder of videos: clips, encoded, with the features of their captions."""

import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grain
import ml_dtypes
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from rcm_jax.data.prepare.captions import Captions, NoCaption, find_videos
from rcm_jax.data.prepare.options import ClipOptions, EncoderOptions, SetOptions
from rcm_jax.data.prepare.prompts import keep_negative
from rcm_jax.data.prepare.sets import LeftOut, Plan, ShardSet, digest_of, key_of
from rcm_jax.data.prepare.text import features
from rcm_jax.data.sample import Sample
from rcm_jax.errors import ArgumentError
from rcm_jax.media.clips import BadVideo, SceneCut, read_clip, read_header, too_short
from rcm_jax.media.sizes import latent_shape
from rcm_jax.outputs import unfinished
from rcm_jax.worlds.wan.files import WanFiles, open_encoders
from rcm_jax.worlds.wan.negative import PROMPT
from rcm_jax.worlds.wan.world import WanWorld

PATCH = 2  # sides of the published networks' patches, in latent pixels
TEXT_TOKENS, NAMED = 512, 100  # of the longest text; bad videos that an error names
DECODERS = 2  # videos that are decoded while one is encoded
STORED = ml_dtypes.bfloat16
SOURCES = "sources.tsv"  # keys and the videos they stand for
Picked = UInt8[np.ndarray, "F H W 3"] | LeftOut


def make_videos(folder: Path, options: SetOptions, clips: ClipOptions, encoders: EncoderOptions) -> str:
    """Raises ArgumentError that lists the videos that cannot be used before anything is encoded, and for options that
    do not go together; BadVideo for what shows only when a video is decoded."""
    names = find_videos(folder)
    captions = Captions(folder, clips.captions)
    files = open_encoders(
        encoders.vae_path, text=encoders.text_encoder_path, tokenizer=encoders.tokenizer_path,
        clip=encoders.image_encoder_path,
    )  # fmt: skip
    shards = ShardSet(options, plan(folder, names, clips, files, encoders.vae_dtype))
    texts, bad = check_videos(folder, names, shards.order, captions, clips)
    if bad and not clips.skip_bad:
        raise ArgumentError(_listed(bad, len(shards.order)), skip_bad=None)
    world = WanWorld(files, vae_dtype=encoders.vae_dtype)
    good = [number for number in shards.order if number in texts]
    words = features(world.encode_text, [texts[number] for number in good])
    pictures = _decoded(folder, names, good, clips)

    def samples(numbers: range) -> Iterator[Sample | LeftOut]:
        for number in numbers:
            if number not in texts:
                yield LeftOut(names[number], bad[names[number]])
                continue
            clip, text = next(pictures), next(words)
            if isinstance(clip, LeftOut):
                yield clip
            else:
                yield encoded(world, key_of(number), clip, text, texts[number], clips.i2v or files.clip is not None)

    told = shards.make(samples, "videos")
    keep_negative(options, world.encode_text, PROMPT)
    if options.process == 0:
        with unfinished(options.out / SOURCES) as new:
            new.write_text("".join(f"{key_of(number)}\t{name}\n" for number, name in enumerate(names)))
    return told


def plan(folder: Path, names: list[str], clips: ClipOptions, files: WanFiles, vae_dtype: str) -> Plan:
    """What the set is to be. Raises ArgumentError for a size or a number of frames that has no latents."""
    vae, size = files.vae.config, clips.pixels
    T, H, W = latent_shape(size, clips.num_frames, space=vae.space, time=vae.time, patch=PATCH)
    asked = dataclasses.asdict(clips) | {"size": f"{size[0]}x{size[1]}", "folder": folder.absolute()}
    for name in ("resolution", "aspect_ratio", "skip_bad"):
        del asked[name]
    if clips.cut is None:
        del asked["cut_threshold"]
    paths = {"vae": files.vae.path, "text_encoder": files.text.path, "clip": files.clip and files.clip.path}
    channels = vae.z_dim * (3 if clips.i2v or files.clip else 1)
    size_of_one = 2 * (T * H * W * channels + TEXT_TOKENS * files.text.config.dim)
    settings = asked | paths | {"vae_dtype": vae_dtype}
    return Plan("videos", settings, len(names), digest_of(names), size_of_one)


def check_videos(
    folder: Path, names: list[str], numbers: list[int], captions: Captions, clips: ClipOptions
) -> tuple[dict[int, str], dict[str, str]]:
    """Captions of those videos that can be used, and of the others, by name, why not. Reads headers alone."""

    def check(number: int) -> tuple[int, str, str]:
        try:
            header = read_header(folder / names[number])
            frames = header.frames(clips.fps)
            if frames is not None and frames < clips.num_frames:
                raise BadVideo(too_short(frames, clips.num_frames, clips.fps))
            return number, captions.of(names[number]), ""
        except (BadVideo, NoCaption, OSError) as error:
            return number, "", str(error)

    texts, bad = {}, {}
    with ThreadPoolExecutor(8) as pool:
        found = tqdm(pool.map(check, numbers), "headers", len(numbers), unit="video", delay=2, leave=False)
        for number, caption, why in found:
            if why:
                bad[names[number]] = why
            else:
                texts[number] = caption
    return texts, bad


def _listed(bad: dict[str, str], count: int) -> str:
    listed = "; ".join(f"{name}: {why}" for name, why in itertools.islice(bad.items(), NAMED))
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return f"{len(bad)} of {count} videos cannot be used ({{skip_bad}} leaves them out): {listed}{more}"


def _decoded(folder: Path, names: list[str], numbers: list[int], clips: ClipOptions) -> Iterator[Picked]:
    """Clips in order, decoded ahead in threads."""
    read = partial(
        read_clip, size=clips.pixels, num_frames=clips.num_frames, fps=clips.fps, cut=clips.cut
    )  # fmt: skip

    def pick(i: int) -> Picked | Exception:
        name = names[numbers[int(i)]]
        try:
            return read(folder / name)
        except BadVideo as error:
            left_out = clips.skip_bad or isinstance(error, SceneCut)
            return LeftOut(name, str(error)) if left_out else BadVideo(f"{name}: {error}")

    ahead = grain.ReadOptions(num_threads=DECODERS, prefetch_buffer_size=DECODERS)
    for clip in grain.MapDataset.range(len(numbers)).map(pick).to_iter_dataset(ahead):
        if isinstance(clip, Exception):
            raise clip
        yield clip


def encoded(
    world: WanWorld, key: str, clip: UInt8[np.ndarray, "F H W 3"], text: np.ndarray, prompt: str, i2v: bool
) -> Sample:
    """A sample of a clip as image-to-video or text-to-video networks are trained with it."""
    video = clip.astype(np.float32) / 127.5 - 1
    condition, image = None, None
    if i2v:
        condition = world.image_channels(video[0], len(video))[0].astype(STORED)
        tokens = world.image_tokens(video[0])
        image = None if tokens is None else tokens[0].astype(STORED)
    return Sample(key, world.encode(video).astype(STORED), text.astype(STORED), prompt, condition, image)
