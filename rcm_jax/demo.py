"""The main job, end to end: teacher, rCM distillation, samples, scores. python -m rcm_jax.demo (or make demo)

Takes the built-in world's teacher (or trains it: --from_scratch), distils it with rCM, samples teacher and student,
and leaves in --out:

  videos.mp4  videos.png   rows: the teacher at 50 steps, the student at 4, 2 and 1 steps, the teacher at 4 steps, which
                           is what a user has without distillation; one prompt a column
  scores.txt  scores.json  the same networks scored from pixels, with 95% intervals
  losses.png               the losses over the steps
  student.safetensors      the student's averaged weights; training/ holds the run's metrics and checkpoints
"""

import argparse
import dataclasses
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from rcm_jax.cli import command_parser, one_line_errors

PICTURE_PROMPTS = (
    "a red circle moving left", "a blue square moving up", "a green diamond moving right",
    "a yellow circle moving down", "a red square moving right", "a blue diamond moving left",
)  # fmt: skip
SCALE = 4  # pixels of the pictures for one of the world's


def parser() -> argparse.ArgumentParser:
    p = command_parser("demo", __doc__)
    p.add_argument("--out", type=Path, default=Path("output/demo"), help="folder for everything (default output/demo)")
    p.add_argument("--from_scratch", action="store_true", help="train the teacher too (40 minutes on 2 cores)")
    p.add_argument("--steps", type=int, help="distillation steps (default: the recipe's, about 4 minutes on 2 cores)")
    p.add_argument("--teacher_steps", type=int, help="with --from_scratch: steps of each of its two parts")
    p.add_argument(
        "--per_caption", type=int, default=4, help="videos for each of 48 captions in the scores (default 4)"
    )
    p.add_argument("--seed", type=int, default=0)
    return p


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table and of the picture."""

    label: str
    path: Path
    num_steps: int


def recipe(module, steps: int | None, seed: int, **changes):
    """A recipe's RunConfig with the demo's few changes."""
    from rcm_jax.configs.base import run_config

    config = module.get_config()
    config.update(changes | {"seed": seed, "tensorboard": False, "keep": 1})
    if steps:
        config.steps = steps
    return run_config(config)


def train_networks(args: argparse.Namespace) -> tuple[Path, Path]:
    """(teacher, student) weights."""
    from rcm_jax.configs import toy_rcm, toy_teacher, toy_teacher_start
    from rcm_jax.training.runs import train_recipe
    from rcm_jax.worlds.builtin import find_model

    teacher = find_model("toy")
    if args.from_scratch:
        config = recipe(toy_teacher_start, args.teacher_steps, args.seed)
        start = train_recipe(config, args.out / "teacher_start", progress="train the teacher, part 1")
        config = recipe(toy_teacher, args.teacher_steps, args.seed + 1, teacher=str(start))
        teacher = train_recipe(config, args.out / "teacher", progress="train the teacher, part 2")
    config = recipe(toy_rcm, args.steps, args.seed, teacher=str(teacher))
    written = train_recipe(config, args.out / "training", progress="distil with rCM")
    student = args.out / "student.safetensors"
    shutil.copyfile(written, student)
    return teacher, student


def picture(rows: list[Row], seed: int, out: Path) -> None:
    """videos.mp4 and videos.png: a labelled grid, a row a network, a column a prompt."""
    from rcm_jax.media.pictures import enlarge, grid, label_rows, strip, to_uint8, write_png
    from rcm_jax.media.video import write_video
    from rcm_jax.pipelines.pipeline import load
    from rcm_jax.pipelines.scoring import sample_row

    prompts = list(PICTURE_PROMPTS)
    videos = [
        to_uint8(sample_row(load(r.path), prompts, [seed], num_steps=r.num_steps, label=r.label)) for r in rows
    ]  # fmt: skip
    labels = [r.label for r in rows]
    frames = label_rows(enlarge(grid(videos, gap=2), SCALE), labels)
    write_video(out / "videos.mp4", frames.repeat(2, axis=0), fps=12)
    # a still picture of moving things: first, middle and last frame of each
    strips = grid([[strip(video, frames=3)[None] for video in row] for row in videos], gap=2)
    write_png(out / "videos.png", label_rows(enlarge(strips, 3), labels)[0])


def plot_losses(workdir: Path, out: Path) -> Path:
    """losses.png: each loss of metrics.jsonl over the steps, with its running mean.

    sCM's loss is the square of a normalised tangent, hence constant: the tangent's norm beside it is what moves.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from rcm_jax.training.metrics import read_metrics

    records = read_metrics(workdir)
    wanted = ("loss_consistency", "tangent_norm", "loss_dmd", "loss_critic")
    names = [n for n in wanted if any(n in r for r in records)]
    figure, axes = plt.subplots(1, len(names), figsize=(3.5 * len(names), 3), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        steps, values = np.array([(r["step"], r[name]) for r in records if name in r]).T
        window = max(1, len(values) // 20)
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(steps, values, color="0.8", linewidth=0.7)
        axis.plot(steps[window - 1 :], mean, color="C0")
        axis.set(title=name.replace("_", " "), xlabel="step", ylim=(0, None))
    figure.savefig(out / "losses.png", dpi=120)
    plt.close(figure)
    return out / "losses.png"


def run(args: argparse.Namespace) -> None:
    from rcm_jax.outputs import check_folder
    from rcm_jax.pipelines.pipeline import load
    from rcm_jax.pipelines.scoring import Table, data_row, sample_row
    from rcm_jax.worlds.toy.scores import evaluation_prompts

    began = time.monotonic()
    check_folder(args.out, "out")
    teacher, student = train_networks(args)
    plot_losses(args.out / "training", args.out)
    rows = [
        Row("teacher 50 steps", teacher, 50), Row("student 4 steps", student, 4), Row("student 2 steps", student, 2),
        Row("student 1 step", student, 1), Row("teacher 4 steps", teacher, 4),
    ]  # fmt: skip
    picture(rows, args.seed, args.out)
    prompts = evaluation_prompts(args.per_caption)
    table = Table()
    table.add("data", [data_row(prompts, args.seed)], prompts)
    for row in rows:
        videos = sample_row(
            load(row.path), prompts, [args.seed + 1], num_steps=row.num_steps, label=f"score {row.label}"
        )
        table.add(row.label, [videos], prompts)
    table.write(args.out / "scores.json")
    (args.out / "scores.txt").write_text(f"{table}\n")
    print(f"\n{table}\n\nMade in {(time.monotonic() - began) / 60:.1f} minutes, in {args.out}:")
    for name in ("videos.mp4", "videos.png", "scores.txt", "scores.json", "losses.png", "student.safetensors"):
        print(f"  {args.out / name}")
    print(
        f"\nSample from the student:\n  {sys.executable} -m rcm_jax.sample --dit_path {student} "
        f'--prompt "a green diamond moving up" --num_steps 2 --num_samples 4 --save_path {args.out / "mine.mp4"}'
    )


def main(argv: list[str] | None = None) -> None:
    """The command; installed as rcm-demo."""
    args = parser().parse_args(argv)
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
