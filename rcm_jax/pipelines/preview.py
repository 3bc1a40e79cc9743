"""Videos of a network while it is trained, and how often they are right.

The average is sampled where it lies, on the run's mesh: every process of the run takes part, and the first one decodes
and writes.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import jax
import numpy as np

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.media.images import open_image
from rcm_jax.media.pictures import enlarge
from rcm_jax.model_file import ModelInfo
from rcm_jax.outputs import unfinished
from rcm_jax.parallel import make_mesh
from rcm_jax.pipelines.opening import Surroundings
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.pipelines.scoring import sample_row
from rcm_jax.pipelines.video import Video, side_by_side
from rcm_jax.training.config import RunConfig
from rcm_jax.training.info import world_name
from rcm_jax.types import Params
from rcm_jax.worlds.builtin import find_model
from rcm_jax.worlds.toy.scores import evaluation_prompts, score
from rcm_jax.worlds.toy.world import ToyWorld
from rcm_jax.worlds.wan.files import open_files
from rcm_jax.worlds.wan.world import WanWorld

PROMPTS = ("a red circle moving left", "a blue square moving up", "a green diamond moving right")
SCORED_STEPS = (4, 1)
BOARD_WIDTH = 960  # pixels of a video in TensorBoard, at most


@dataclasses.dataclass(frozen=True)
class Previews:
    """Called as (step, weights, what they are, workdir): `samples/STEP.mp4` in the workdir, the weights' videos of the
    prompts, each from a noise of its own, and the same in `tensorboard/previews`."""

    prompts: tuple[str, ...]
    around: Surroundings
    asked: dict[str, Any]
    seed: int = 0
    tensorboard: bool = False

    def __call__(self, step: int, params: Params, info: ModelInfo, workdir: Path) -> None:
        pipe, count = Pipeline.of(params, info, self.around), range(len(self.prompts))
        here = make_mesh(devices=jax.local_devices()[:1])  # for the world's networks; the run's mesh is set around us
        with jax.set_mesh(here):
            videos = pipe.videos(self.prompts, seed=self.seed, indices=count, progress="", **self.asked)
            if jax.process_index() == 0:
                video = side_by_side(list(videos), gap=pipe.world.gap)
                video.save(workdir / "samples" / f"{step:07d}.mp4")
                if self.tensorboard:
                    to_board(workdir / "tensorboard" / "previews", step, video)


def open_previews(config: RunConfig) -> Previews:
    """Of a run. Files are opened, prompts and image encoded now, before the run takes the memory.

    Raises what opening raises, and ValueError for prompts or networks of which there are no previews."""
    asked = config.previews
    _check_shown(config)
    how = {"num_steps": asked.num_steps} if asked.num_steps else {}
    if world_name(config) == "toy":
        around, prompts = Surroundings(ToyWorld()), asked.prompts or PROMPTS
    else:
        around = _around_wan(config)
        prompts, world, (T, H, W) = asked.prompts or (WanWorld.prompt,), around.world, config.data.latent_shape
        space = around.files.vae.config.space
        size, frames = (W * space, H * space), world.num_frames(T)
        how |= {"size": f"{size[0]}x{size[1]}", "num_frames": frames}
        if asked.image:
            how["image_path"] = asked.image
            world.condition(open_image(asked.image), size, frames)
    around.world.encode_text([*prompts, ""])
    return Previews(prompts, around, how, config.seed, config.tensorboard)


def _check_shown(config: RunConfig) -> None:
    """Raises ValueError for what is missing to show a run's network, or is there in vain."""
    image, low, high = config.previews.image, *config.method.t_range
    if config.model.takes_image and not image:
        raise ValueError("previews of a network that takes an image need one: set previews.image, or sample_every=0")
    if image and not config.model.takes_image:
        raise ValueError(f"previews.image={image!r} is for networks that take an image, and this one takes none")
    if (low, high) != (0.0, 1.0):
        raise ValueError(
            f"previews of an expert for the times from {low:g} to {high:g} would need the other: set sample_every=0, "
            "and sample both from what weights_every leaves"
        )


def _around_wan(config: RunConfig) -> Surroundings:
    """What is named in `config.previews`; the rest beside the weights that the student starts from."""
    start, asked = config.init or config.teacher, config.previews
    if not start:
        raise ValueError("previews need the files around a network of Wan's: train from one, or set sample_every=0")
    network = open_checkpoint(find_model(start, "config.teacher"), num_heads=config.model.num_heads)
    named = {
        "vae": asked.vae, "text": asked.text_encoder, "tokenizer": asked.tokenizer, "clip": asked.image_encoder,
    }  # fmt: skip
    files = open_files([network], **{name: path or None for name, path in named.items()})
    return Surroundings(WanWorld(files, dtype=config.model.dtype), files)


def to_board(folder: Path, step: int, video: Video) -> None:
    """For TensorBoard, as an image that moves."""
    from tensorboardX import SummaryWriter  # slow to import
    from tensorboardX.proto.summary_pb2 import Summary

    frames = enlarge(video.frames, video.scale)
    every = -(-frames.shape[2] // BOARD_WIDTH)
    frames = np.ascontiguousarray(frames[:, ::every, ::every])
    gif = iio.imwrite("<bytes>", frames, extension=".gif", plugin="pillow", duration=1000 / video.fps, loop=0)
    _, height, width, _ = frames.shape
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
    with SummaryWriter(str(folder)) as board:
        board.file_writer.add_summary(Summary(value=[Summary.Value(tag="videos", image=image)]), step)


def score_preview(step: int, params: Params, info: ModelInfo, workdir: Path, *, seed: int = 0) -> None:
    """Adds records to `scores.jsonl` in the workdir: which share of videos, one of every caption, is right in all,
    sampled in each of SCORED_STEPS. A resumed run's records replace those it had made beyond its checkpoint."""
    prompts, pipe = evaluation_prompts(1), Pipeline.of(params, info)
    records = [record for record in read_previews(workdir) if record["step"] < step]
    for num_steps in SCORED_STEPS:
        videos = sample_row(pipe, prompts, [seed], num_steps=num_steps, label="")
        records.append({"step": step, "num_steps": num_steps, "all": score(videos, prompts)["all"]})
    with unfinished(workdir / "scores.jsonl") as new:  # a run that is killed here leaves the old one
        new.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_previews(workdir: str | Path) -> list[dict]:
    """The records that `score_preview` made in a workdir."""
    file = Path(workdir) / "scores.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
