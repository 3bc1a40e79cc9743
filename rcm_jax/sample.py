"""Samples videos: python -m rcm_jax.sample --dit_path student.safetensors --prompt "a red circle moving left"

A distilled student makes a video in --num_steps 1, 2, 3 or 4; a teacher is integrated as an ODE with guidance
(--sampler, --guidance_scale, 50 steps). Which of them a file is, the file says. Without --dit_path the built-in toy
teacher is sampled. Prompts of the toy world are made of the words: a, red green blue yellow, circle square diamond,
moving, left right up down. Video i of a seed is the same on every run and in every batch.
"""

import argparse
from pathlib import Path

from rcm_jax.cli import one_line_errors


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m rcm_jax.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--dit_path", default="toy", help="model file of the network; 'toy' is the built-in teacher")
    p.add_argument("--prompt", default="a red circle moving left", help="what to show")
    p.add_argument("--num_samples", type=int, default=1, help="videos, side by side in one file (default 1)")
    p.add_argument(
        "--num_steps", type=int, help="network calls: 1 to 4 for a student (default 4), any for a teacher (50)"
    )
    p.add_argument("--sigma_max", type=float, help="first noise level of a student (default: the file's, 80 for rCM)")
    p.add_argument("--sampler", choices=("euler", "unipc", "dpm++", "wan_unipc", "wan_dpm++"), help="teacher (unipc)")
    p.add_argument("--guidance_scale", type=float, help="classifier-free guidance of a teacher (default: the file's)")
    p.add_argument("--shift", type=float, default=5.0, help="time shift of a teacher's schedule (default 5)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save_path", type=Path, default=Path("output/generated_video.mp4"), help="where the MP4 goes")
    p.add_argument("--scale", type=int, default=8, help="enlarges the toy world's 24 pixels for the eye (default 8)")
    return p


def sampler_from(args: argparse.Namespace, info):
    """The file's own sampler with what the flags change. Flags of the other kind of network are errors."""
    import dataclasses

    from rcm_jax.training.runs import sampler_for

    student = info.kind == "student"
    for flag, ours in (("sampler", not student), ("guidance_scale", not student), ("sigma_max", student)):
        if getattr(args, flag) is not None and not ours:
            raise ValueError(f"--{flag} does not apply: {args.dit_path} is a {info.kind}")
    asked = {
        "name": args.sampler, "num_steps": args.num_steps, "sigma_max": args.sigma_max,
        "guidance": args.guidance_scale, "shift": args.shift,
    }  # fmt: skip
    return dataclasses.replace(sampler_for(info), **{k: v for k, v in asked.items() if v is not None})


def run(args: argparse.Namespace) -> Path:
    from rcm_jax.data.world import open_world
    from rcm_jax.sampling.generate import generate
    from rcm_jax.sampling.video import enlarge, grid, to_uint8, write_video
    from rcm_jax.training.model_file import find_model, load_model, read_info

    if args.num_samples < 1:
        raise ValueError(f"--num_samples={args.num_samples} must be at least 1")
    path = find_model(args.dit_path)
    info = read_info(path)
    sampler = sampler_from(args, info)
    world = open_world(info.world)
    world.encode_text([args.prompt])  # an unknown word is known before anything is loaded
    params, _ = load_model(path)
    videos = generate(
        params, info.model, world, [args.prompt] * args.num_samples, latent_shape=info.latent_shape, sampler=sampler,
        seed=args.seed, progress="sample",
    )  # fmt: skip
    return write_video(args.save_path, to_uint8(enlarge(grid(videos[None]), args.scale)), world.fps)


def main(argv: list[str] | None = None) -> None:
    """The command; installed as rcm-sample."""
    args = parser().parse_args(argv)
    with one_line_errors():
        print(run(args))


if __name__ == "__main__":
    main()
