"""Videos of a network while it is trained, and how often they are right."""

import json
from pathlib import Path

from rcm_jax.model_file import ModelInfo
from rcm_jax.outputs import unfinished
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.pipelines.scoring import sample_row
from rcm_jax.pipelines.video import side_by_side
from rcm_jax.types import Params
from rcm_jax.worlds.toy.scores import evaluation_prompts, score

PROMPTS = ("a red circle moving left", "a blue square moving up", "a green diamond moving right")
SCORED_STEPS = (4, 1)


def write_preview(step: int, params: Params, info: ModelInfo, workdir: Path, *, seed: int = 0) -> None:
    """`samples/STEP.mp4` in the workdir: the weights' videos of some prompts, each from a noise of its own."""
    pipe = Pipeline.of(params, info)
    videos = pipe(PROMPTS, seed=seed, indices=range(len(PROMPTS)), progress="")
    side_by_side(videos, gap=pipe.world.gap).save(workdir / "samples" / f"{step:07d}.mp4")


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
