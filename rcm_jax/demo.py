"""The main job, end to end: teacher, rCM distillation, samples, scores. python -m rcm_jax.demo (or make demo)

Takes the built-in world's teacher (or trains it: --from_scratch), distils it with rCM, samples teacher and student,
and leaves in --out:

  videos.mp4  videos.png   rows: the teacher at 50, 4 and 2 steps, the student at 4, 2 and 1, with the network passes
                           that a video costs; one prompt a column
  quality.png              the share of right videos against network passes, teacher and student
  scores.txt  scores.json  the same networks scored from pixels, with passes and 95% intervals
  training.png             what moved in training: the tangent's norm, DMD's and the critic's loss, the student's scores
  student.safetensors      the student's averaged weights; training/ holds the run's metrics and checkpoints

The folder says in demo.json what made it. The same command again goes on where it was stopped, and does not train again
what is trained; --per_caption alone may change. Any other request needs a folder of its own.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rcm_jax.cli import command_parser, one_line_errors
from rcm_jax.errors import ArgumentError
from rcm_jax.options import add_options, check_options, option, taken
from rcm_jax.outputs import check_folder, unfinished
from rcm_jax.ranges import at_least, between
from rcm_jax.version import version
from rcm_jax.xla_flags import share_cpus

if TYPE_CHECKING:
    from rcm_jax.pipelines.scoring import Table

PICTURE_PROMPTS = (
    "a red circle moving left", "a blue square moving up", "a green diamond moving right",
    "a yellow circle moving down", "a red square moving right", "a blue diamond moving left",
)  # fmt: skip
SCALE = 5  # pixels of the video for one of the world's
STILL_SCALE = 3  # of the picture, which has three frames of each
PREVIEWS = 4  # how often the student is scored while it is trained
RECORD = "demo.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """What a demo is asked for."""

    from_scratch: bool = option(False, "train the teacher too (40 minutes on 2 cores)")
    steps: int | None = option(
        None, "distillation steps (default: the recipe's, about 3 minutes on 2 cores)", range=at_least(1)
    )
    teacher_steps: int | None = option(
        None, "with --from_scratch: steps of each of the teacher's two parts", range=at_least(1)
    )
    per_caption: int = option(2, "videos for each of 48 captions in the scores (default 2)", range=at_least(1))
    seed: int = option(0, "of everything (default 0)", range=between(0, 2**31 - 2))  # it and the next are int32 in runs

    def __post_init__(self) -> None:
        check_options(self)
        if self.teacher_steps is not None and not self.from_scratch:
            raise ArgumentError(
                "{teacher_steps} needs {from_scratch}: the built-in teacher is trained",
                teacher_steps=self.teacher_steps, from_scratch=None,
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table and of the picture."""

    network: str
    path: str | Path
    num_steps: int

    @property
    def label(self) -> str:
        return f"{self.network} {self.steps}"

    @property
    def steps(self) -> str:
        return f"{self.num_steps} step{'s' * (self.num_steps > 1)}"


def parser() -> argparse.ArgumentParser:
    p = command_parser("demo", __doc__)
    p.add_argument("--out", type=Path, default=Path("output/demo"), help="folder for everything (default output/demo)")
    add_options(p, Demo)
    return p


def claim_folder(out: Path, demo: Demo) -> None:
    """Makes the folder, or checks that this demo made it; what was there stays as it was.

    `per_caption` may differ from what the folder says: it changes how the student is scored, and scores are made anew
    whenever the command runs. Raises ValueError where another demo, or none, made what is in it, or where nothing can
    be written."""
    asked, made = dataclasses.asdict(demo) | {"version": version()}, _record(out)
    differ = [name for name in asked if made and made.get(name) != asked[name]]
    if made is None and out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"{out} is not empty, and no demo made it ({RECORD} is not there): name another folder with --out"
        )
    if set(differ) - {"per_caption"}:
        there, now = (", ".join(f"{name} {_told(of.get(name))}" for name in differ) for of in (made, asked))
        raise ValueError(
            f"{out} has a demo with {there}; this one is with {now}. The same request goes on with it; for another one "
            "name another folder with --out"
        )
    if differ:
        print(f"scores anew: {demo.per_caption} videos a caption, {made['per_caption']} before", file=sys.stderr)
    check_folder(out, "out").mkdir(parents=True, exist_ok=True)
    with unfinished(out / RECORD) as new:
        new.write_text(json.dumps(asked, indent=1) + "\n")


def _record(out: Path) -> dict | None:
    """What a demo wrote of itself into the folder; None where there is no such thing."""
    try:
        made = json.loads((out / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return made if isinstance(made, dict) and "per_caption" in made else None


def _told(value: object) -> str:
    return "as the recipe has it" if value is None else str(value)


def recipe(module, steps: int | None, seed: int, **changes):
    """A recipe's RunConfig with the demo's few changes."""
    from rcm_jax.configs.base import run_config

    config = module.get_config()
    config.update(changes | {"seed": seed, "tensorboard": False, "keep": 1})
    if steps is not None:
        config.steps = steps
    return run_config(config)


def train_networks(out: Path, demo: Demo) -> tuple[str | Path, Path]:
    """(teacher, student) weights."""
    from rcm_jax.configs import toy_rcm_short, toy_teacher, toy_teacher_start
    from rcm_jax.training.runs import train_recipe

    teacher = "toy"
    if demo.from_scratch:
        config = recipe(toy_teacher_start, demo.teacher_steps, demo.seed)
        start = train_recipe(config, out / "teacher_start", progress="train the teacher, part 1")
        config = recipe(toy_teacher, demo.teacher_steps, demo.seed + 1, teacher=str(start))
        teacher = train_recipe(config, out / "teacher", progress="train the teacher, part 2")
    config = recipe(toy_rcm_short, demo.steps, demo.seed, teacher=str(teacher))
    student = out / "student.safetensors"
    shutil.copyfile(distil(config, out / "training"), student)
    return teacher, student


def distil(config, workdir: Path) -> Path:
    """The student's weights; it is scored on the way, and the teacher's weights are before the first step."""
    import jax

    from rcm_jax.model_file import load_model
    from rcm_jax.pipelines.preview import read_previews, score_preview
    from rcm_jax.training.runs import model_info, train_recipe
    from rcm_jax.worlds.builtin import find_model

    config = dataclasses.replace(config, sample_every=-(-config.steps // PREVIEWS))

    def scored(step, params, info, workdir):  # on one device, as the table's rows are: a program compiles once for all
        score_preview(step, jax.device_get(params), info, workdir, seed=config.seed)

    if not read_previews(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        scored(0, load_model(find_model(config.teacher))[0], model_info(config), workdir)
    return train_recipe(config, workdir, open_samples=lambda _: scored, progress="distil with rCM")


def score_rows(rows: list[Row], demo: Demo) -> "tuple[Table, dict[str, np.ndarray]]":
    """The table, and by their labels the first video of every caption of each row."""
    from rcm_jax.pipelines.pipeline import load
    from rcm_jax.pipelines.scoring import Table, data_row, row_passes, sample_row
    from rcm_jax.worlds.toy.scores import evaluation_prompts

    prompts = evaluation_prompts(demo.per_caption)
    table, shown = Table(), {}
    table.add("data", [data_row(prompts, demo.seed)], prompts)
    for row in rows:
        pipe = load(row.path)
        videos = sample_row(pipe, prompts, [demo.seed + 1], num_steps=row.num_steps, label=f"score {row.label}")
        table.add(row.label, [videos], prompts, passes=row_passes(pipe, num_steps=row.num_steps))
        shown[row.label] = videos[[prompts.index(prompt) for prompt in PICTURE_PROMPTS]]
    return table, shown


def picture(shown: dict[str, np.ndarray], passes: dict[str, float], out: Path) -> None:
    """videos.mp4 and videos.png: a labelled grid, a row a network, a column a prompt."""
    from rcm_jax.media.pictures import enlarge, grid, label_columns, label_rows, strip, to_uint8, write_png
    from rcm_jax.media.video import write_video

    margin = 130
    rows = [f"{label}\n{passes[label]:g} pass{'es' * (passes[label] > 1)}" for label in shown]

    def labelled(frames: np.ndarray) -> np.ndarray:
        return label_columns(label_rows(frames, rows, width=margin), list(PICTURE_PROMPTS), left=margin)

    videos = [to_uint8(row) for row in shown.values()]
    frames = labelled(enlarge(grid(videos, gap=2), SCALE))
    write_video(out / "videos.mp4", frames.repeat(2, axis=0), fps=12)
    # a still picture of moving things: first, middle and last frame of each
    strips = grid([[strip(video, frames=3)[None] for video in row] for row in videos], gap=2)
    write_png(out / "videos.png", labelled(enlarge(strips, STILL_SCALE))[0])


def quality(rows: list[Row], table: "Table", path: Path) -> None:
    """quality.png: what each network's scores cost."""
    from rcm_jax.pipelines.plots import Point, plot_quality

    curves: dict[str, list] = {}
    for row in rows:
        name = row.steps if row.network in curves else f"{row.network}, {row.steps}"
        point = Point(name, table.passes[row.label], table.rows[row.label]["all"])
        curves.setdefault(row.network, []).append(point)
    plot_quality(curves, table.rows["data"]["all"]["value"], path)


def run(out: Path, demo: Demo) -> None:
    began = time.monotonic()
    claim_folder(out, demo)

    from rcm_jax.pipelines.plots import plot_training

    teacher, student = train_networks(out, demo)
    plot_training(out / "training", out / "training.png")
    rows = [Row("teacher", teacher, n) for n in (50, 4, 2)] + [Row("student", student, n) for n in (4, 2, 1)]
    table, shown = score_rows(rows, demo)
    picture(shown, table.passes, out)
    quality(rows, table, out / "quality.png")
    table.write(out / "scores.json")
    (out / "scores.txt").write_text(f"{table}\n")
    print(f"\n{table}\n\nMade in {(time.monotonic() - began) / 60:.1f} minutes, in {out}:")
    names = ("videos.mp4", "videos.png", "quality.png", "scores.txt", "scores.json", "training.png", student.name)
    print(*(f"  {out / name}" for name in names), sep="\n")
    print(
        f"\nSample from the student:\n  {sys.executable} -m rcm_jax.sample --dit_path {student} "
        f'--prompt "a green diamond moving up" --num_steps 2 --mid_t 5/6 --num_samples 4 --save_path {out / "mine.mp4"}'
    )


def main(argv: list[str] | None = None) -> None:
    """The command; installed as rcm-demo."""
    args = parser().parse_args(argv)
    with one_line_errors():
        share_cpus()
        run(args.out, Demo(**taken(vars(args), Demo)))


if __name__ == "__main__":
    main()
