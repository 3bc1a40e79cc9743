"""Converts networks between the files of the PyTorch world and ours.

  python -m rcm_jax.convert SOURCE OUT                      to our model file (or, with --format orbax, a checkpoint)
  python -m rcm_jax.convert export SOURCE OUT --to wan      back: wan, rcm, diffusers or transformers
  python -m rcm_jax.convert merge BASE OUT --student S --reference R     base + scale · (student - reference)
  python -m rcm_jax.convert merge BASE OUT --lora FILE                   base + scale · LoRA
  python -m rcm_jax.convert lora FILE OUT --form comfyui     a LoRA as diffusers, ComfyUI or kohya's tools name it
  python -m rcm_jax.convert checkpoint STEP OUT             a network of a training run, from WORKDIR/checkpoints/STEP
  python -m rcm_jax.convert inspect FILE                     what it is, its sizes, how it would be sampled
  python -m rcm_jax.convert diff A B                         in what two networks differ, most first
  python -m rcm_jax.convert verify FILE                      whether its numbers are those that were written

SOURCE is a .safetensors, .pt or .pth file or a folder of them (sharded, diffusers', ours), here or on the Hugging Face
hub (org/name, hf://org/name@revision/file). What is in it is recognised and said in one line. Of several copies of a
network, averaged weights come first: {preferred}; --entry chooses.
Pickles are read without being run, and without PyTorch. Memory holds one layer at a time.
Files carry checksums, which `verify` compares. A conversion that was killed goes on when the same command is run again.
`checkpoint` takes the average of the student, or --which student or fake_score; `lora` takes it of a run that learns
one. A LoRA that a run has left says how the sum with its base is sampled, and so does what `merge` makes of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rcm_jax.cli import command_parser, one_line_errors
from rcm_jax.options import add_options, taken

if TYPE_CHECKING:
    from rcm_jax.convert.checkpoint import Checkpoint, NetworkOptions


OURS = ("safetensors", "orbax")
LOOKS = ("inspect", "diff", "verify")


def _common(p: argparse.ArgumentParser) -> None:
    from rcm_jax.convert.networks import DTYPES

    p.add_argument("out", metavar="OUT", type=Path, help="what to write")
    p.add_argument("--dtype", choices=DTYPES, default="keep", help="of the weights written; with bfloat16, parts that "
                   "are computed with in float32 stay float32 (default: as they are)")  # fmt: skip
    p.add_argument("--dry_run", action="store_true", help="print what would go where, and write nothing")
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")


def _anybodys(p: argparse.ArgumentParser) -> None:
    from rcm_jax.convert.networks import MODELS

    p.add_argument("source", metavar="SOURCE", help="file or folder to read, here or on the Hugging Face hub")
    p.add_argument("--entry", help="which copy of the network, e.g. generator or net_ema, where there are several")
    p.add_argument("--model", choices=MODELS, help="fail unless SOURCE is this network in this size")


def _checkpoints(p: argparse.ArgumentParser) -> None:
    from rcm_jax.convert.training import WHICH

    p.add_argument("source", metavar="STEP", help="folder of a run's checkpoint, WORKDIR/checkpoints/STEP")
    p.add_argument("--which", choices=WHICH, default="average", help="network of the run (default: %(default)s)")


def _lora(p: argparse.ArgumentParser) -> argparse.ArgumentParser:
    from rcm_jax.convert.lora import FORMS
    from rcm_jax.convert.training import WHICH

    p.add_argument("source", metavar="FILE", help="LoRA file, or WORKDIR/checkpoints/STEP of a run that learns one")
    p.add_argument("--form", choices=FORMS, default="diffusers", help="whose names (default: %(default)s)")
    p.add_argument("--which", choices=WHICH, default="average", help="of a checkpoint (default: %(default)s)")
    _common(p)
    return p


def _looks(command: str, p: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Those that write nothing."""
    from rcm_jax.cli import number
    from rcm_jax.convert.checkpoint import NetworkOptions
    from rcm_jax.ranges import at_least

    if command == "diff":
        p.add_argument("source", metavar="A", help="file or folder of a network")
        p.add_argument("other", metavar="B", help="another of the same kind, by whatever names")
        p.add_argument("--most", type=number(int, at_least(1)), default=20, help="tensors to list (default 20)")
        add_options(p, NetworkOptions, names=["num_heads"])
        return p
    p.add_argument("source", metavar="FILE", help="file or folder of a network or a LoRA, here or on the hub")
    if command == "verify":
        return p
    p.add_argument("--entry", help="which copy of the network, where there are several")
    p.add_argument("--tensors", action="store_true", help="list all of them by Wan2.1's names")
    add_options(p, NetworkOptions)
    return p


def parser(command: str) -> argparse.ArgumentParser:
    from rcm_jax.convert.checkpoint import PREFERRED, NetworkOptions
    from rcm_jax.convert.export import TARGETS

    words = "convert" if command == "convert" else f"convert {command}"
    p = command_parser(words, __doc__.format(preferred=", ".join(PREFERRED)))
    if command == "lora":
        return _lora(p)
    if command in LOOKS:
        return _looks(command, p)
    _checkpoints(p) if command == "checkpoint" else _anybodys(p)
    _common(p)
    if command != "checkpoint":  # it says how it is sampled
        add_options(p, NetworkOptions, names=["num_heads"] if command == "export" else None)
    if command in ("convert", "checkpoint"):
        p.add_argument("--format", dest="to", choices=OURS, default="safetensors", help="default: %(default)s")
        p.add_argument("--text_tower", action="store_true", help="keep CLIP's text tower, for the way back to Wan2.1's "
                       "own code, which asks for it (default: the image tower alone)")  # fmt: skip
    else:
        targets, default = (TARGETS, "wan") if command == "export" else ((*OURS, *TARGETS), "safetensors")
        p.add_argument("--to", choices=targets, default=default, help="whose names and layout (default: %(default)s)")
    if command in ("export", "merge"):
        p.add_argument("--shard_size", metavar="SIZE", help="write files up to this size and an index, like 5GB")
    if command == "merge":
        p.add_argument("--student", help="network whose difference from --reference is added")
        p.add_argument("--reference", help="what the student was distilled from")
        p.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]",
                       help="LoRA file to add; may be given several times")  # fmt: skip
        p.add_argument("--skip", metavar="PATTERN", help="layers of a LoRA that are left out: 'k_img|v_img|img_emb'")
        p.add_argument("--scale", type=float, default=1.0, help="factor of what is added (default 1)")
        p.add_argument("--keep", metavar="PATTERN", help="tensors that stay the base's, e.g. patch_embedding")
    return p


def sources(command: str, args: argparse.Namespace) -> list[str]:
    """All that is read and could be written over."""
    if command == "checkpoint":
        return []
    if command != "merge":
        return [args.source]
    from rcm_jax.convert.merge import given_lora

    loras = [str(given_lora(text).path) for text in args.lora]
    return [args.source, *filter(None, (args.student, args.reference)), *loras]


def merge(args: argparse.Namespace, options: NetworkOptions, base: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """The network that `merge` makes, and the one that tells how it is sampled."""
    from rcm_jax.convert.checkpoint import open_checkpoint
    from rcm_jax.convert.merge import Given, add_difference, add_loras, given_lora
    from rcm_jax.hub import find

    if bool(args.student) != bool(args.reference) or not (args.student or args.lora):
        raise ValueError("give --student and --reference together, or --lora")
    if args.dtype == "float32":  # or the sum would be rounded to what the base is in
        base = dataclasses.replace(base, tensors={name: t.astype("float32") for name, t in base.tensors.items()})
    network, like = base, base
    if args.student:
        paths, heads = (find(args.student, "student"), find(args.reference, "reference")), options.num_heads
        like, reference = (open_checkpoint(path, num_heads=heads) for path in paths)
        print(like, reference, sep="\n")
        network = add_difference(network, like, reference, scale=args.scale, keep=args.keep)
    given = [Given(path, strength * args.scale) for path, strength in map(given_lora, args.lora)]
    if args.skip and not given:
        raise ValueError("--skip leaves out layers of a LoRA: give --lora")
    network = add_loras(network, given, skip=args.skip)
    return network, network if given and network.info is not base.info else like


def run_lora(args: argparse.Namespace) -> None:
    from rcm_jax.convert.lora import lora_tensors, read_lora, write_lora
    from rcm_jax.convert.output import check_apart, check_form, check_place
    from rcm_jax.convert.training import ABOUT, lora_of_step
    from rcm_jax.hub import find

    check_form(args.out, "safetensors")
    source = find(args.source)
    if not args.dry_run:
        check_apart(args.out, [Path(args.source)])
        check_place(args.out, overwrite=args.overwrite)
    step = isinstance(source, Path) and (source / ABOUT).is_dir()
    lora = lora_of_step(source, args.which) if step else read_lora(source)
    print(lora)
    if args.dry_run:
        print(*(f"{name} {t.shape} {t.dtype}" for name, t in lora_tensors(lora, args.form)[0].items()), sep="\n")
        return
    write_lora(lora, args.out, args.form, dtype=args.dtype, overwrite=args.overwrite)
    print(f"wrote {args.out}")


def look(command: str, args: argparse.Namespace) -> None:
    from rcm_jax.convert.checkpoint import NetworkOptions
    from rcm_jax.convert.inspecting import lines_about, lines_of_difference
    from rcm_jax.convert.verifying import lines_of_check

    options = NetworkOptions(**taken(vars(args), NetworkOptions))
    if command == "inspect":
        lines = lines_about(args.source, options, entry=args.entry, tensors=args.tensors)
    elif command == "verify":
        lines = lines_of_check(args.source)
    else:
        lines = lines_of_difference(args.source, args.other, options, args.most)
    for line in lines:
        print(line)


def run(command: str, args: argparse.Namespace) -> None:
    if command == "lora":
        return run_lora(args)
    if command in LOOKS:
        return look(command, args)
    from rcm_jax.convert.checkpoint import NetworkOptions, info_of, open_checkpoint
    from rcm_jax.convert.clip import TOWER
    from rcm_jax.convert.export import export, their_tensors
    from rcm_jax.convert.journal import made_of
    from rcm_jax.convert.networks import with_dtype
    from rcm_jax.convert.output import bytes_of, check_apart, check_form, check_place, write_model
    from rcm_jax.convert.training import open_step, verify_step

    shards = getattr(args, "shard_size", None) and bytes_of(args.shard_size)
    if shards and args.to in OURS:
        raise ValueError("--shard_size is for the forms of others: a file of ours is one")
    check_form(args.out, args.to, shards=bool(shards))
    if not args.dry_run:
        check_apart(args.out, [Path(source) for source in sources(command, args)])
        check_place(args.out, overwrite=args.overwrite)
    given = {name: value for name, value in vars(args).items() if name not in ("out", "overwrite", "dry_run")}
    options = NetworkOptions(**taken(vars(args), NetworkOptions))
    if command == "checkpoint":
        if Path(args.source).resolve() in args.out.resolve().parents:
            raise FileExistsError(f"{args.out} is in the checkpoint that is read: give another name")
        source = open_step(Path(args.source), args.which)
    else:
        source = open_checkpoint(args.source, entry=args.entry, model=args.model, num_heads=options.num_heads)
    print(source)
    source, like = merge(args, options, source) if command == "merge" else (source, source)
    ours = args.to in OURS
    tensors = with_dtype(source.ours(), args.dtype, source.network) if ours else None
    if args.dry_run:
        theirs = {} if ours else their_tensors(source, args.to, args.dtype)
        lines = [f"{t.origin} -> {name} {t.shape} {t.dtype}" for name, t in theirs.items()]
        print(*(source.mapping(tensors) if ours else lines), sep="\n")
        return
    if command == "checkpoint":
        verify_step(Path(args.source), args.which)
    of = made_of([*sources(command, args)] or [Path(args.source)], {"command": command, **given})
    if ours:
        besides = source.kept(args.dtype, ("",) if getattr(args, "text_tower", False) else (TOWER,))
        write_model(args.out, tensors, info_of(source, options, like), format=args.to, overwrite=args.overwrite,
                    besides=besides, of=of)  # fmt: skip
    else:
        export(source, args.out, args.to, dtype=args.dtype, overwrite=args.overwrite, shard_size=shards, of=of)
    print(f"wrote {args.out}")


@contextlib.contextmanager
def tidy_when_stopped() -> Iterator[None]:
    """A signal unwinds the command, so that what it has half written goes; exit code 128 + the signal's number."""
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a long --dry_run has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(argv: list[str] | None = None) -> None:
    """The command; installed as rcm-convert."""
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # Orbax tells of its own plans
    argv = sys.argv[1:] if argv is None else argv
    commands = ("export", "merge", "lora", "checkpoint", *LOOKS)
    command = argv[0] if argv and argv[0] in commands else "convert"
    args = parser(command).parse_args(argv[command != "convert" :])
    with one_line_errors(), tidy_when_stopped():
        run(command, args)
