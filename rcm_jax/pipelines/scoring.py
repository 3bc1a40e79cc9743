"""Scores of networks on the built-in world, from the pixels of their videos: rows of a table, with what each costs."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rcm_jax.objectives.config import CausalConfig
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.worlds import toy
from rcm_jax.worlds.toy.scores import format_table, score

LEGEND = {  # columns, in order, and what they say
    "all": "share of videos whose colour, shape and direction are all as asked",
    "colour": "share of videos whose colour is",
    "shape": "share of videos whose shape is",
    "direction": "share of videos whose direction is",
    "overlap": "of the shape with the ideal one of its area and place; 1 is the same",
    "noise": "standard deviation of the background, which should be even; frames are in [-1, 1]",
    "position_spread": "of the places in videos of one caption, in pixels: diversity",
    "position_ratio": "the same relative to the world's own spread",
}
PASSES = "network evaluations for a video: one a step, one more for a causal network's cache; twice that under guidance"


def data_row(prompts: list[str], seed: int) -> np.ndarray:
    """Fresh videos of the world for these prompts, through the codec: what a perfect network would make."""
    codec = toy.ToyCodec.load()
    return np.asarray(codec.decode(codec.encode(toy.batch(10_000 + seed, range(len(prompts)), prompts)[0])))


class Table:
    """Rows of scores; every row keeps its summary over all videos, its passes, and the `all` score of each network
    alone."""

    def __init__(self):
        self.rows: dict[str, dict] = {}
        self.passes: dict[str, float] = {}
        self.single: dict[str, list[float]] = {}

    def add(self, name: str, videos: list[np.ndarray], prompts: list[str], *, passes: float | None = None) -> None:
        """videos: one array for each network of the row, all of the same prompts. passes: of the network, for one of
        them; None for what no network made."""
        self.rows[name] = score(np.concatenate(videos), prompts * len(videos))
        if passes is not None:
            self.passes[name] = passes
        if len(videos) > 1:
            self.single[name] = [score(v, prompts, resamples=1)["all"]["value"] for v in videos]

    def __str__(self) -> str:
        first = {"passes": {name: f"{passes:g}" for name, passes in self.passes.items()}}
        lines = [format_table(self.rows, tuple(LEGEND), first=first)]
        for name, values in self.single.items():
            lines.append(f"{name}: all of each network " + " ".join(f"{v:.3f}" for v in values))
        width = max(map(len, LEGEND))
        explained = {"passes": PASSES} | LEGEND
        lines += ["", *(f"{name.replace('_', ' '):{width}}  {told}" for name, told in explained.items())]
        return "\n".join([*lines, "Beside each score is its 95% bootstrap interval."])

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {"rows": self.rows, "passes": self.passes, "all_of_each": self.single}
        path.write_text(json.dumps(told, indent=1))


def asked_of(pipe: Pipeline, num_steps: int, middle: tuple[float, ...] | None = None) -> dict[str, Any]:
    """How a network is sampled for scores: a student's few-step sampler, with `middle` between its steps, or Euler for
    a teacher; by rollout if it is causal."""
    if pipe.info.kind == "student":
        return {"num_steps": num_steps} | ({} if middle is None else {"mid_t": middle})
    return {"num_steps": num_steps} | ({} if pipe.causal else {"sampler": "euler"})


def row_passes(pipe: Pipeline, *, num_steps: int, middle: tuple[float, ...] | None = None) -> float:
    """Evaluations of the network for a video that `sample_row` makes. Of a causal one, which goes over a chunk at a
    time: how often it goes over each frame."""
    how = pipe.sampling(**asked_of(pipe, num_steps, middle))
    if not pipe.causal:
        return how.passes
    return how.passes(CausalConfig(**pipe.info.causal).spans(pipe.info.latent_shape[0]))


def sample_row(
    pipe: Pipeline, prompts: list[str], seeds: list[int], *, num_steps: int, label: str,
    middle: tuple[float, ...] | None = None,
) -> np.ndarray:  # fmt: skip
    """A network's videos in [-1, 1], sampled by `asked_of`. Every video has a noise of its own."""
    asked = asked_of(pipe, num_steps, middle) | {"indices": range(len(prompts)), "progress": label}
    return np.concatenate([pipe.arrays(prompts, seed=seed, **asked) for seed in seeds])
