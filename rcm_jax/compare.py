"""The same prompts and noises through several networks: python -m rcm_jax.compare old=toy@50 mine=student.safetensors@2

A network is NAME=PATH@STEPS (or PATH@STEPS, or PATH: 4 steps of a student, 50 of a teacher). --out has a contact sheet
(sheet.png: a row a network, a column a prompt), all videos side by side (side_by_side.mp4), and the table with every
number (compare.json). What is measured needs no other network: agreement with the reference, which is the first network
unless --reference names another, at equal noise (beside a causal network bidirectional ones take noise drawn chunk by
chunk; causal ones of two chunk patterns have none in common); diversity over noises; change and flicker in time;
seconds and passes for a video. On the built-in world its own scores stand beside them, with their rank correlation to
each measure.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcm_jax.cli import command_parser, number, one_line_errors
from rcm_jax.ranges import at_least, between

STEPS = {"student": 4, "teacher": 50}
NAMES = ("sheet.png", "side_by_side.mp4", "compare.json")


def parser() -> argparse.ArgumentParser:
    p = command_parser("compare", __doc__)
    p.add_argument("networks", nargs="+", metavar="NAME=PATH@STEPS", help="networks to compare, two or more")
    p.add_argument("--reference", metavar="NAME", help="that the others should agree with (default: the first)")
    p.add_argument("--prompt", nargs="+", help="prompts (default: the world's own; the built-in world's: six captions)")
    p.add_argument("--prompts_file", type=Path, help="a prompt a line")
    p.add_argument("--samples", type=number(int, at_least(1)), default=4, help="videos of a prompt (4)")
    p.add_argument("--seed", type=number(int, between(0, 2**32 - 1)), default=0, help="of their noises (0)")
    p.add_argument(
        "--students", nargs="+", default=[], metavar="NAME",
        help="networks that are students, in files that do not say so, as published ones (else: teachers, guided)",
    )  # fmt: skip
    p.add_argument("--image_path", type=Path, help="first frame of all videos, for image-to-video networks")
    p.add_argument("--num_frames", type=number(int, at_least(1)), help="frames (default: the networks')")
    p.add_argument("--size", metavar="WxH", help="of Wan's videos")
    p.add_argument("--out", type=Path, default=Path("compare"), help="folder of what is made (compare)")
    return p


def network(text: str) -> tuple[str, str, int | None]:
    """(name, path, steps) of NAME=PATH@STEPS. Raises ValueError."""
    name, equals, rest = text.partition("=")
    if not equals or "/" in name:  # there is no name: an equals sign is the path's
        name, equals, rest = "", "", text
    path, at, steps = rest.rpartition("@")
    path, steps = (path, steps) if at and steps.isdigit() else (rest, "")
    if (steps and int(steps) < 1) or not path or (equals and not name):
        raise ValueError(f"{text!r} must be NAME=PATH@STEPS, like mine=student.safetensors@4")
    return name or (f"{Path(path).stem} {steps}".strip()), path, int(steps) if steps else None


def checked(args: argparse.Namespace) -> list[tuple[str, str, int | None]]:
    """The networks. Raises ValueError for what does not go together, before any of them is opened."""
    from rcm_jax.media.video import check_encoder
    from rcm_jax.outputs import check_output

    given = [network(text) for text in args.networks]
    names = [name for name, *_ in given]
    if len(given) < 2:
        raise ValueError("there is nothing to compare: give two networks or more")
    if len(set(names)) < len(names):
        raise ValueError(f"two networks are called {max(names, key=names.count)!r}: name each, NAME=PATH@STEPS")
    if args.reference not in (None, *names):
        raise ValueError(f"--reference {args.reference!r} is none of {', '.join(names)}")
    if strange := sorted(set(args.students) - set(names)):
        raise ValueError(f"--students {strange[0]!r} is none of {', '.join(names)}")
    for name in NAMES:
        check_output(args.out / name, "out")
    check_encoder()
    return given


def run(args: argparse.Namespace) -> str:
    from rcm_jax.pipelines.comparing import Comparison, noise_pattern, sample, table
    from rcm_jax.pipelines.pipeline import load
    from rcm_jax.pipelines.scoring import asked_of
    from rcm_jax.worlds.prompts_file import given_prompts
    from rcm_jax.worlds.toy.scores import evaluation_prompts

    given = checked(args)
    prompts = given_prompts(args.prompt, args.prompts_file)
    pipes = {name: load(path, kind="student" if name in args.students else None) for name, path, _ in given}
    worlds, world = {pipe.info.world for pipe in pipes.values()}, pipes[given[0][0]].world
    if len(worlds) > 1:
        raise ValueError(f"networks of one world can be compared, not of {' and '.join(sorted(worlds))}")
    prompts = list(prompts or (evaluation_prompts(1)[::9] if worlds == {"toy"} else [world.prompt]))
    shared = ("image_path", "num_frames", "size")
    more = {name: getattr(args, name) for name in shared if getattr(args, name) is not None}
    options: dict[str, dict[str, Any]] = {}
    shapes: dict[str, str] = {}
    for name, _, steps in given:  # all that can be wrong, before the first is sampled
        options[name] = {"seed": args.seed, "num_steps": steps or STEPS[pipes[name].info.kind], **more}
        how = asked_of(pipes[name], options[name]["num_steps"]) | options[name]
        asked = pipes[name].check(prompts, **how)
        shapes[name] = f"{asked.num_frames} frames of {asked.size[0]}x{asked.size[1]}"
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"videos of one shape can be compared, not {told}: say --num_frames or --size")
    reference = args.reference or given[0][0]
    if pattern := noise_pattern(pipes, reference):
        options |= {name: options[name] | {"noise_pattern": pattern} for name in pipes if not pipes[name].causal}
    found = {name: sample(pipe, prompts, args.samples, options[name], name) for name, pipe in pipes.items()}
    made = Comparison(found, reference, prompts, args.samples, world)
    sheet, film, numbers = (args.out / name for name in NAMES)
    made.draw(sheet, film)
    rows, with_truth = made.rows(), made.goes_with_truth()
    told = {"reference": made.reference, "prompts": prompts, "options": options, "rows": rows, "goes_with": with_truth}
    numbers.write_text(json.dumps(told, indent=1, default=str))
    lines = [table(rows), ""]
    if with_truth:
        ranks = ", ".join(f"{name.replace('_', ' ')} {value:+.2f}" for name, value in with_truth.items())
        lines.append(f"rank correlation of each measure with the built-in world's own scores: {ranks}")
    return "\n".join([*lines, *map(str, (sheet, film, numbers))])


def main(argv: Sequence[str] | None = None) -> None:
    """The command; installed as rcm-compare."""
    args = parser().parse_args(argv)
    with one_line_errors():
        print(run(args))


if __name__ == "__main__":
    main()
