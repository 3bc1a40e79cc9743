"""Samples videos: prompts in, an MP4 out.

  python -m rcm_jax.sample --dit_path student.safetensors --prompt "a red circle moving left"      # the built-in world
  python -m rcm_jax.sample --dit_path rCM_Wan2.1_T2V_1.3B_480p.pt --prompt "a fox in the snow"      # Wan2.1
  python -m rcm_jax.sample --dit_path Wan2.1-I2V-14B-480P --image_path fox.png --adaptive_resolution --prompt "it runs"

A distilled student makes a video in --num_steps 1, 2, 3 or 4; a teacher is integrated as an ODE with guidance
(--sampler, --guidance_scale, 50 steps). Which of them a network is, our files say; of other files those named as rCM's
and Self-Forcing's students are are students, all else is a teacher; --kind overrules both. Sample i of a prompt and a
seed is the same on every run and in every batch. Causal networks: python -m rcm_jax.sample_causal.

Without --dit_path the built-in toy teacher is sampled. Prompts of the toy world are made of the words: a, red green
blue yellow, circle square diamond, moving, left right up down. Every other network is one of Wan's, and takes our files
(python -m rcm_jax.convert) or the published ones: the files around it are looked for beside it and in checkpoints/.
Text encoder, network and autoencoder are in memory one after the other.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rcm_jax.cli import one_line_errors

TOY_PROMPT = "a red circle moving left"
WAN_PROMPT = (
    "A red fox trots through fresh snow at dawn; the camera follows it from the side, low sun behind the trees."
)
SAVE_PATH = Path("output/generated_video.mp4")
WAN_DEFAULTS = {
    "num_frames": 77, "adaptive_resolution": False, "dtype": "bfloat16", "vae_tiling": False, "fsdp": 1, "sequence": 1
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m rcm_jax.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--dit_path", default="toy", help="file or folder of the network; 'toy' is the built-in teacher")
    p.add_argument("--prompt", help="what to show")
    p.add_argument("--num_samples", type=int, default=1, help="videos, side by side in one file (default 1)")
    p.add_argument(
        "--num_steps", type=int, help="network calls: 1 to 4 for a student (default 4), any for a teacher (50)"
    )
    p.add_argument("--sigma_max", type=float, help="first noise level of a student (default: the file's, 80 for rCM)")
    p.add_argument("--sampler", choices=("euler", "unipc", "dpm++", "wan_unipc", "wan_dpm++"), help="teacher (unipc)")
    p.add_argument(
        "--guidance_scale", type=float, help="classifier-free guidance of a teacher (default: the file's, 5)"
    )
    p.add_argument("--shift", type=float, default=5.0, help="time shift of a teacher's schedule (default 5)")
    p.add_argument("--kind", choices=("teacher", "student"), help="how to sample the network (see above)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save_path", type=Path, default=SAVE_PATH, help="where the MP4 goes (default: %(default)s)")
    p.add_argument("--scale", type=int, help="enlarges the toy world's 24 pixels for the eye (default 8)")
    wan(p.add_argument_group("Wan's networks"))
    return p


def wan(p) -> None:
    """The flags that the toy world does not have; None where they are not given."""
    p.add_argument("--model_size", choices=("1.3B", "14B"), help="fail unless the network has this size")
    p.add_argument("--second_dit_path", help="Wan2.2: the network for less noise; --dit_path is that for more")
    p.add_argument("--boundary", type=float, help="Wan2.2: time at which they change (0.875; 0.9 from an image)")
    p.add_argument("--vae_path", help="video autoencoder")
    p.add_argument("--text_encoder_path", help="umT5")
    p.add_argument("--tokenizer_path", help="its tokenizer.json or spiece.model, or their folder")
    p.add_argument("--image_encoder_path", help="CLIP, for the networks that take its tokens")
    p.add_argument("--num_heads", type=int, help="of the network, where they are not 128 wide and no config.json says")
    p.add_argument(
        "--round_time_to", choices=("none", "bfloat16"), help="default: the file's; bfloat16 for rCM's files"
    )
    p.add_argument("--num_frames", type=int, help="frames, 4k + 1 (default 77; 16 a second)")
    p.add_argument("--resolution", help="480p (default) or 720p")
    p.add_argument("--aspect_ratio", help="1:1, 4:3, 3:4, 16:9 (default) or 9:16")
    p.add_argument("--size", metavar="WxH", help="width and height in pixels instead of the two")
    p.add_argument("--prompts_file", type=Path, help="a prompt a line; videos are numbered: generated_video_000.mp4, …")
    p.add_argument("--negative_prompt", help="what guidance leads away from (default: the empty prompt)")
    p.add_argument("--image_path", help="first frame, for image-to-video networks")
    p.add_argument("--adaptive_resolution", action="store_true", default=None, help="the image's proportions")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="of weights and products (default bfloat16)")
    p.add_argument("--vae_tiling", action="store_true", default=None, help="decode in tiles: less memory")
    p.add_argument("--fsdp", type=int, help="GPUs that share the network's weights (default 1)")
    p.add_argument("--sequence", type=int, help="GPUs that share a video's tokens (default 1)")
    p.add_argument("--batch_size", type=int, help="videos at a time (default: --fsdp)")


def sampler_from(args: argparse.Namespace, info):
    """The file's own sampler with what the flags change. Flags of the other kind of network are errors."""
    import dataclasses

    from rcm_jax.training.runs import sampler_for

    student = info.kind == "student"
    teachers = [("sampler", not student), ("guidance_scale", not student), ("negative_prompt", not student)]
    for flag, ours in (*teachers, ("sigma_max", student)):
        if getattr(args, flag) is not None and not ours:
            raise ValueError(f"--{flag} does not apply: {args.dit_path} is a {info.kind}; --kind overrules that")
    asked = {
        "name": args.sampler, "num_steps": args.num_steps, "sigma_max": args.sigma_max,
        "guidance": args.guidance_scale, "shift": args.shift,
    }  # fmt: skip
    return dataclasses.replace(sampler_for(info), **{k: v for k, v in asked.items() if v is not None})


def is_toy(path: Path) -> bool:
    """Whether a file is ours and of the toy world; its format and its faults are the converter's to tell."""
    from rcm_jax.model_file import read_info

    if path.is_dir() and not (path / "model.json").is_file():
        return False
    try:
        return read_info(path).world == "toy"
    except ValueError:
        return False


def run(args: argparse.Namespace) -> list[Path]:
    """Writes the videos; returns where they are."""
    from rcm_jax.worlds.builtin import find_model

    if args.num_samples < 1:
        raise ValueError(f"--num_samples={args.num_samples} must be at least 1")
    if args.save_path.suffix != ".mp4":
        raise ValueError(f"--save_path {args.save_path} must end in .mp4")
    args.save_path.parent.mkdir(parents=True, exist_ok=True)  # its error before the work
    path = find_model(args.dit_path)
    return run_toy(args, path) if is_toy(path) else run_wan(args, path)


def run_toy(args: argparse.Namespace, path: Path) -> list[Path]:
    import dataclasses

    from rcm_jax.media.pictures import enlarge, grid, to_uint8
    from rcm_jax.media.video import write_video
    from rcm_jax.model_file import load_model, read_info
    from rcm_jax.sampling.generate import generate
    from rcm_jax.worlds.world import open_world

    others = argparse.ArgumentParser()
    wan(others)
    if given := [a.option_strings[0] for a in others._actions[1:] if getattr(args, a.dest) is not None]:
        raise ValueError(f"{', '.join(given)} does not apply: {args.dit_path} is of the built-in world")
    info = read_info(path)
    info = dataclasses.replace(info, kind=args.kind or info.kind)
    sampler = sampler_from(args, info)
    world, prompt = open_world(info.world), args.prompt or TOY_PROMPT
    world.encode_text([prompt])  # an unknown word is known before anything is loaded
    params, _ = load_model(path)
    videos = generate(
        params, info.model, world, [prompt] * args.num_samples, latent_shape=info.latent_shape, sampler=sampler,
        seed=args.seed, progress="sample",
    )  # fmt: skip
    return [write_video(args.save_path, to_uint8(enlarge(grid(videos[None]), args.scale or 8)), world.fps)]


def run_wan(args: argparse.Namespace, path: Path) -> list[Path]:
    import dataclasses

    from rcm_jax.convert.commands import info_for
    from rcm_jax.media.video import write_video
    from rcm_jax.sampling.memory import Job
    from rcm_jax.sampling.wan_video import Request, first_frame, make_videos
    from rcm_jax.worlds.wan.files import open_files
    from rcm_jax.worlds.wan.world import WanWorld

    if args.scale is not None:
        raise ValueError(f"--scale does not apply: {args.dit_path} is not of the built-in world")
    size, prompts = video_size(args), read_prompts(args)
    args = argparse.Namespace(**{k: WAN_DEFAULTS.get(k) if v is None else v for k, v in vars(args).items()})
    files = open_files(
        [path, *([args.second_dit_path] if args.second_dit_path else [])], vae=args.vae_path,
        text=args.text_encoder_path, tokenizer=args.tokenizer_path, clip=args.image_encoder_path,
        model_size=args.model_size, num_heads=args.num_heads,
    )  # fmt: skip
    info = info_for(files.dit[0], files.dit[0], args)
    sampler, image = sampler_from(args, info), None
    if args.image_path:
        step = files.vae.config.space * info.model.patch_size[1]
        size, image = first_frame(args.image_path, size, adaptive=args.adaptive_resolution, step=step)
    elif args.adaptive_resolution:
        raise ValueError("--adaptive_resolution takes its proportions from an image: give --image_path")
    job = Job(
        files, size, args.num_frames, args.dtype, batch_size=args.batch_size or args.fsdp, fsdp=args.fsdp,
        sequence=args.sequence, tiled=args.vae_tiling,
    )  # fmt: skip
    request = Request(
        job, dataclasses.replace(info.model, dtype=args.dtype), sampler, prompts, num_samples=args.num_samples,
        seed=args.seed, negative_prompt=args.negative_prompt or "", image=image, boundary=args.boundary,
    )  # fmt: skip
    print(f"{files.dit[0]}\nsampled as a {info.kind}: {sampler}, {size[0]}x{size[1]}", file=sys.stderr)
    paths = video_paths(args.save_path, len(prompts) if args.prompts_file else None)
    return [write_video(path, v, WanWorld.fps) for path, v in zip(paths, make_videos(request), strict=True)]


def video_size(args: argparse.Namespace) -> tuple[int, int]:
    """(width, height) that the flags ask for."""
    from rcm_jax.media.sizes import parse_size, table_size

    if args.size is None:
        return table_size(args.resolution or "480p", args.aspect_ratio or "16:9")
    if args.resolution or args.aspect_ratio:
        raise ValueError("give --size, or --resolution and --aspect_ratio")
    return parse_size(args.size)


def read_prompts(args: argparse.Namespace) -> Sequence[str]:
    if args.prompts_file is None:
        return [WAN_PROMPT if args.prompt is None else args.prompt]
    if args.prompt is not None:
        raise ValueError("give --prompt or --prompts_file, not both")
    prompts = [line.strip() for line in args.prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompts_file} has no prompts")
    return prompts


def video_paths(path: Path, count: int | None) -> list[Path]:
    """The one path, or one for each of `count` prompts."""
    return [path] if count is None else [path.with_stem(f"{path.stem}_{i:03d}") for i in range(count)]


def main(argv: list[str] | None = None) -> None:
    """The command; installed as rcm-sample."""
    args = parser().parse_args(argv)
    with one_line_errors():
        print(*run(args), sep="\n")


if __name__ == "__main__":
    main()
