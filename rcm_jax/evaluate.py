"""Scores networks on the built-in world: python -m rcm_jax.evaluate --student rcm=runs/toy_rcm/student.safetensors

Rows: the data (through the codec), the teacher at each of --teacher_steps, and every student at
each of --num_steps. A student is NAME=PATH, or NAME=PATH,PATH,… for one recipe trained from several seeds: their
videos are scored together, and the `all` score of each network is printed below. A path may be on the Hugging Face hub
(org/name, hf://org/name@revision/file). Scores are measured from pixels, and stand beside the network passes that a
video costs; the table explains its columns.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rcm_jax.cli import command_parser, number, one_line_errors
from rcm_jax.ranges import at_least, between

if TYPE_CHECKING:
    from rcm_jax.pipelines.scoring import Table


def parser() -> argparse.ArgumentParser:
    p = command_parser("evaluate", __doc__)
    p.add_argument("--student", action="append", default=[], metavar="NAME=PATH[,PATH…]", help="may be repeated")
    p.add_argument("--teacher", default="toy", help="model file of the teacher ('toy': the built-in one; '': none)")
    count, seed = number(int, at_least(1)), number(int, between(0, 2**32 - 1))
    p.add_argument("--num_steps", type=count, nargs="+", default=[4, 2, 1], help="sampler steps (default 4 2 1)")
    p.add_argument("--teacher_steps", type=count, nargs="+", default=[50, 4, 2], help="Euler steps (default 50 4 2)")
    p.add_argument(
        "--mid_t", nargs="+", help="times between students' steps, as far as steps go (causal: 15/16 5/6 5/8)"
    )
    p.add_argument("--per_caption", type=count, default=8, help="videos for each of the 48 captions (default 8)")
    p.add_argument("--seeds", type=seed, nargs="+", default=[0], help="sampling seeds, scored together")
    p.add_argument("--json", type=Path, help="also write the table here")
    return p


def students(specs: list[str]) -> dict[str, list[str]]:
    """{"rcm": [paths]} from NAME=PATH,PATH specs."""
    wrong = [s for s in specs if "=" not in s]
    if wrong:
        raise ValueError(f"--student {wrong[0]!r} must be NAME=PATH or NAME=PATH,PATH")
    return {name: paths.split(",") for name, _, paths in (s.partition("=") for s in specs)}


def run(args: argparse.Namespace) -> "Table":
    from rcm_jax.options import times
    from rcm_jax.outputs import check_output
    from rcm_jax.pipelines.pipeline import load
    from rcm_jax.pipelines.scoring import Table, asked_of, data_row, row_passes, sample_row
    from rcm_jax.sampling.schedules import few_step_schedule
    from rcm_jax.worlds.builtin import find_model
    from rcm_jax.worlds.toy.scores import evaluation_prompts

    if args.json:
        check_output(args.json, "json")
    teacher = [find_model(args.teacher, "teacher")] if args.teacher else []
    named = {name: [find_model(path, "student") for path in paths] for name, paths in students(args.student).items()}
    rows = [(f"teacher {n}", teacher, n) for n in args.teacher_steps if teacher]
    rows += [(f"{name} {n}", paths, n) for name, paths in named.items() for n in args.num_steps]
    middle = None if args.mid_t is None else times(args.mid_t, "mid_t")
    if middle is not None:
        few_step_schedule(args.num_steps, middle=middle)  # its errors
    pipes = {path: load(path) for _, paths, _ in rows for path in paths}
    for _, paths, n in rows:  # all that can be wrong, before the first row is sampled
        for path in paths:
            if pipes[path].info.world != "toy":
                raise ValueError(f"{path} is of the world {pipes[path].info.world!r}: scores are of the built-in one")
            pipes[path].sampling(**asked_of(pipes[path], n, middle))

    prompts = evaluation_prompts(args.per_caption)
    pooled = prompts * len(args.seeds)
    table = Table()
    table.add("data", [data_row(pooled, args.seeds[0])], pooled)
    for label, paths, n in rows:
        asked = {"num_steps": n, "middle": middle}
        videos = [sample_row(pipes[path], prompts, args.seeds, label=label, **asked) for path in paths]
        table.add(label, videos, pooled, passes=row_passes(pipes[paths[0]], **asked))
    return table


def main(argv: list[str] | None = None) -> None:
    """The command; installed as rcm-evaluate."""
    args = parser().parse_args(argv)
    with one_line_errors():
        table = run(args)
        if args.json:
            table.write(args.json)
    print(table)


if __name__ == "__main__":
    main()
