"""What can be said of videos without a measuring network: agreement at equal noise, diversity, flicker."""

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from rcm_jax.media.pictures import enlarge, grid, label_columns, label_rows, strip, write_png
from rcm_jax.media.video import write_video
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.pipelines.scoring import asked_of, row_passes
from rcm_jax.worlds import toy
from rcm_jax.worlds.toy.scores import measure
from rcm_jax.worlds.toy.world import ToyWorld
from rcm_jax.worlds.world import World

Frames = UInt8[np.ndarray, "V F H W 3"]
STRIP = 3  # frames of a video on the sheet
COLUMNS = {
    "passes": "of the network for a video; a guided step takes two",
    "seconds": "for a video, from its prompt to its frames; of large networks with loading and compiling",
    "psnr": "of frames against the reference's from the same noise, dB, mean over the videos",
    "psnr_latents": "the same of latents; their range in the reference is the peak",
    "diversity": "root mean square between videos of a prompt from two noises, levels of 255",
    "change": "mean absolute difference of neighbouring frames, levels of 255: motion and flicker",
    "flicker": "the same of second differences, which steady motion in time does not have",
    "right": "built-in world: videos whose colour, shape and direction are as asked",
}


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Of one network. frames: a row a video, prompts in order, each with its samples. noise: what makes two networks'
    noises the same: their initial noise is drawn in one piece, or a chunk at a time."""

    frames: Frames
    latents: Float[np.ndarray, "V T H W C"]
    seconds: float
    passes: float
    noise: tuple[Any, ...]


def noise_pattern(pipes: Mapping[str, Pipeline], reference: str) -> str | None:
    """Chunks whose noise the bidirectional networks take: the reference's own, or those of the first causal network."""
    causal = [pipe for pipe in (pipes[reference], *pipes.values()) if pipe.causal]
    return causal[0].info.causal["pattern"] if causal else None


def sample(pipe: Pipeline, prompts: Sequence[str], samples: int, options: dict[str, Any], label: str) -> Sampled:
    """`samples` videos of each prompt. A small network is run once before it is timed."""
    asked = asked_of(pipe, options["num_steps"]) | options | {"num_samples": samples}
    if pipe.world.small:
        pipe.both(list(prompts), progress="", **asked)
    began = time.monotonic()
    latents, frames = pipe.both(list(prompts), progress=label, **asked)
    seconds = (time.monotonic() - began) / len(frames)
    noise = (pipe.info.causal["pattern"] if pipe.causal else options.get("noise_pattern"), latents.shape[1:])
    return Sampled(frames, latents, seconds, row_passes(pipe, num_steps=options["num_steps"]), noise)


def psnr(one: np.ndarray, other: np.ndarray, peak: float) -> Float[np.ndarray, " V"]:
    """Peak signal-to-noise ratio of each video, dB; 120 where they are the same."""
    square = np.array([np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(one, other, strict=True)])
    return 10 * np.log10(peak**2 / np.maximum(square, 1e-12 * peak**2))


def diversity(frames: Frames, samples: int) -> float | None:
    """Mean over prompts and pairs of their videos; None where a prompt has one."""
    if samples < 2:
        return None
    pairs = itertools.chain.from_iterable(
        itertools.combinations(frames[i : i + samples], 2) for i in range(0, len(frames), samples)
    )
    return float(np.mean([np.sqrt(np.mean((one.astype(np.float32) - other) ** 2)) for one, other in pairs]))


def change(frames: Frames, order: int = 1) -> Float[np.ndarray, " V"]:
    """Mean absolute difference along time, of that order; 0 where there are too few frames."""
    if frames.shape[1] <= order:
        return np.zeros(len(frames))
    return np.array([np.abs(np.diff(video.astype(np.float32), n=order, axis=0)).mean() for video in frames])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of networks by their names; every one has `samples` videos of each prompt."""

    found: Mapping[str, Sampled]
    reference: str
    prompts: Sequence[str]
    samples: int
    world: World

    def measures(self, name: str) -> dict[str, Float[np.ndarray, " V"]]:
        """A number for each video; agreement where the reference's noise is the same."""
        own, reference = self.found[name], self.found[self.reference]
        out = {"change": change(own.frames), "flicker": change(own.frames, 2)}
        if name != self.reference and own.noise == reference.noise:
            out["psnr"] = psnr(own.frames, reference.frames, 255.0)
            out["psnr_latents"] = psnr(own.latents, reference.latents, float(np.ptp(reference.latents)))
        return out

    def truth(self, name: str) -> dict[str, np.ndarray] | None:
        """The built-in world's own scores of each video, of the length that they are for."""
        frames = self.found[name].frames
        if not isinstance(self.world, ToyWorld) or frames.shape[1] != toy.FRAMES:
            return None
        texts = [prompt for prompt in self.prompts for _ in range(self.samples)]
        return measure(frames.astype(np.float32) / 127.5 - 1, texts)

    def rows(self) -> dict[str, dict[str, float | None]]:
        """Means over the videos of each network."""
        out = {}
        for name, own in self.found.items():
            means = {measure: float(np.mean(values)) for measure, values in self.measures(name).items()}
            spread = diversity(own.frames, self.samples)
            out[name] = {"passes": own.passes, "seconds": own.seconds, "diversity": spread} | means
            if (truth := self.truth(name)) is not None:
                out[name]["right"] = float(truth["all"].mean())
        return out

    def goes_with_truth(self) -> dict[str, float]:
        """Of each measure, how well it orders the videos as the built-in world's scores do (the overlap of a shape with
        its ideal): Spearman's rank correlation over all videos that have it."""
        from scipy.stats import spearmanr

        pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for name in self.found:
            if (truth := self.truth(name)) is not None:
                for measured, values in self.measures(name).items():
                    pairs.setdefault(measured, []).append((values, truth["overlap"]))
        joined = {name: [np.concatenate(side) for side in zip(*both, strict=True)] for name, both in pairs.items()}
        return {name: float(spearmanr(*both).statistic) for name, both in joined.items() if np.ptp(both[0]) > 0}

    def draw(self, sheet: Path, film: Path) -> None:
        """A row a network. The sheet has some frames of the first video of each prompt, the film all videos."""
        scale, gap, names = self.world.scale, self.world.gap * self.world.scale, list(self.found)
        videos = {name: enlarge(own.frames, scale) for name, own in self.found.items()}
        strips = [[strip(v, frames=STRIP)[None] for v in videos[name][:: self.samples]] for name in names]
        picture = label_rows(grid(strips, gap=max(gap, 4)), names)
        write_png(sheet, label_columns(picture, list(self.prompts), left=150)[0])
        write_video(film, label_rows(grid([list(videos[name]) for name in names], gap=gap), names), self.world.fps)


def table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Markdown, and what its columns are."""
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows.values())]
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in names)} |", "|---" * (1 + len(names)) + "|"]
    for label, values in rows.items():
        cells = ["" if (value := values.get(name)) is None else f"{value:.3g}" for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{name.replace('_', ' '):13} {COLUMNS[name]}" for name in names)])
