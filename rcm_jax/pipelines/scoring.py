"""Scores of networks on the built-in world, from the pixels of their videos: rows of a table."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.worlds import toy
from rcm_jax.worlds.toy.scores import format_table, score

COLUMNS = ("all", "colour", "shape", "direction", "overlap", "noise", "position_spread", "position_ratio")


def data_row(prompts: list[str], seed: int) -> np.ndarray:
    """Fresh videos of the world for these prompts, through the codec: what a perfect network would make."""
    codec = toy.ToyCodec.load()
    return np.asarray(codec.decode(codec.encode(toy.batch(10_000 + seed, range(len(prompts)), prompts)[0])))


class Table:
    """Rows of scores; every row keeps its summary over all videos and the `all` score of each network alone."""

    def __init__(self):
        self.rows: dict[str, dict] = {}
        self.single: dict[str, list[float]] = {}

    def add(self, name: str, videos: list[np.ndarray], prompts: list[str]) -> None:
        """videos: one array for each network of the row, all of the same prompts."""
        self.rows[name] = score(np.concatenate(videos), prompts * len(videos))
        if len(videos) > 1:
            self.single[name] = [score(v, prompts, resamples=1)["all"]["value"] for v in videos]

    def __str__(self) -> str:
        text = format_table(self.rows, COLUMNS)
        for name, values in self.single.items():
            text += f"\n{name}: all of each network " + " ".join(f"{v:.3f}" for v in values)
        return text

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"rows": self.rows, "all_of_each": self.single}, indent=1))


def asked_of(pipe: Pipeline, num_steps: int, middle: tuple[float, ...] | None = None) -> dict[str, Any]:
    """How a network is sampled for scores: a student's few-step sampler, or Euler for a teacher; by rollout if it is
    causal, with `middle` between a student's steps."""
    if pipe.causal:
        between = middle is not None and pipe.info.kind == "student"
        return {"num_steps": num_steps} | ({"mid_t": middle} if between else {})
    return {"num_steps": num_steps} | ({"sampler": "euler"} if pipe.info.kind == "teacher" else {})


def sample_row(
    pipe: Pipeline, prompts: list[str], seeds: list[int], *, num_steps: int, label: str,
    middle: tuple[float, ...] | None = None,
) -> np.ndarray:  # fmt: skip
    """A network's videos in [-1, 1], sampled by `asked_of`. Every video has a noise of its own."""
    asked = asked_of(pipe, num_steps, middle) | {"indices": range(len(prompts)), "progress": label}
    return np.concatenate([pipe.arrays(prompts, seed=seed, **asked) for seed in seeds])
