"""Videos of a network while it is trained."""

from pathlib import Path

from rcm_jax.model_file import ModelInfo
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.pipelines.video import side_by_side
from rcm_jax.types import Params

PROMPTS = ("a red circle moving left", "a blue square moving up", "a green diamond moving right")


def write_preview(step: int, params: Params, info: ModelInfo, workdir: Path, *, seed: int = 0) -> None:
    """`samples/STEP.mp4` in the workdir: the weights' videos of some prompts, each from a noise of its own."""
    pipe = Pipeline.of(params, info)
    videos = pipe(PROMPTS, seed=seed, indices=range(len(PROMPTS)), progress="")
    side_by_side(videos, gap=pipe.world.gap).save(workdir / "samples" / f"{step:07d}.mp4")
