"""Streams causal video: python -m rcm_jax.sample_causal --model toy --stream --prompt "a red circle moving left"

A causal network makes a video chunk by chunk, each on the keys of those before it. With --stream the MP4 plays while
it grows. What a model file says (chunk pattern, window, steps) is the default; the flags change it. A few-step student,
or any file with --distilled, takes --num_steps 1 to 4 a chunk, or --steps_per_chunk 4 2: four for the first, two for
all others. A teacher is integrated as an ODE with guidance. Times are numbers or fractions: --mid_t 15/16 5/6 5/8, or
one list an entry of --steps_per_chunk: --mid_t_schedules "15/16,5/6,5/8;5/6" (empty for one step: "15/16,5/6,5/8;").
With --window a video may be of any length.

A Wan network is one of our files (python -m rcm_jax.convert) or a published one, and the files around it are found as
python -m rcm_jax.sample finds them. A published file does not say its chunks: give --first_chunk_t and --chunk_t.
"""

import argparse
import dataclasses
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rcm_jax.cli import one_line_errors, times

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.sharding import Mesh

    from rcm_jax.model_file import ModelInfo
    from rcm_jax.sampling.causal_world import Surroundings
    from rcm_jax.sampling.schedules import RolloutSchedule
    from rcm_jax.sampling.stream import Profile
    from rcm_jax.types import Params
    from rcm_jax.wan.causal import CausalDiT

SIGMA_MAX, GUIDANCE, WAN_FRAMES = 1600.0, 3.0, 81  # published, for files that do not say
TOY_PROMPT = "a red circle moving left"
WAN_FLAGS = (
    "model_size", "vae_path", "text_encoder_path", "tokenizer_path", "num_heads", "round_time_to", "resolution",
    "aspect_ratio", "size", "adaptive_resolution", "dtype", "vae_dtype",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m rcm_jax.sample_causal", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--model", choices=("toy",), help="the built-in causal student, which is also the default")
    p.add_argument("--dit_path", help="model file of the network")
    p.add_argument("--prompt", help="what to show")
    p.add_argument("--negative_prompt", help="what guidance leads away from (default: no text)")
    p.add_argument("--image_path", type=Path, help="the video's first frame, a first chunk of 1 latent frame")
    p.add_argument("--num_samples", type=int, default=1, help="videos, side by side in one file (default 1)")
    p.add_argument("--num_frames", type=int, help="frames of the video (default: the file's)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--fsdp", type=int, default=1, help="GPUs that share the network's weights (default 1)")
    p.add_argument(
        "--sequence", type=int, default=1, help="GPUs that share a chunk's tokens and the cache's heads (default 1)"
    )
    p.add_argument(
        "--save_path", type=Path, default=Path("output/causal_generated_video.mp4"), help="where the MP4 goes"
    )

    chunks = p.add_argument_group("chunks")
    chunks.add_argument("--first_chunk_t", type=int, help="latent frames of the first chunk (default: the file's)")
    chunks.add_argument("--chunk_t", type=int, help="latent frames of the others (default: the file's)")
    chunks.add_argument("--window", type=int, help="chunks that stay visible, the current one included; 0: all")
    chunks.add_argument("--sink", type=int, help="first chunks that always stay visible")

    steps = p.add_argument_group("steps")
    steps.add_argument("--distilled", action="store_true", help="sample in few steps whatever the file says")
    steps.add_argument("--num_steps", type=int, help="of every chunk: 1 to 4 distilled, any for a teacher (50)")
    steps.add_argument("--sigma_max", type=float, help=f"first noise level (default: the file's, else {SIGMA_MAX:g})")
    steps.add_argument(
        "--guidance_scale", type=float, help="classifier-free guidance of a teacher (default: the file's)"
    )
    steps.add_argument("--timestep_shift", type=float, help="time shift of a teacher's schedule (default 3)")
    steps.add_argument("--mid_t", nargs="*", help="times between the first step and the data (15/16 5/6 5/8)")
    steps.add_argument("--steps_per_chunk", type=int, nargs="+", help="steps of each chunk; the last repeats")
    steps.add_argument("--mid_t_schedules", help="the times between, one list an entry of --steps_per_chunk")
    steps.add_argument(
        "--context_from_last_step", action=argparse.BooleanOptionalAction,
        help="the last step gives the cache its keys, and a pass is saved (default: the file's)",
    )  # fmt: skip
    steps.add_argument("--context_from_last_step_start_chunk", type=int, help="from this chunk on (default 0)")

    out = p.add_argument_group("streaming and timing")
    out.add_argument("--stream", action="store_true", help="write an MP4 that plays while it grows")
    out.add_argument("--profile", action="store_true", help="print latency, rate and peak memory")
    out.add_argument("--warmup_iters", type=int, default=0, help="runs before the timed ones; implies --profile")
    out.add_argument("--num_runs", type=int, default=1, help="timed runs; more than 1 implies --profile")

    wan = p.add_argument_group("Wan's networks")
    wan.add_argument("--model_size", choices=("1.3B", "14B"), help="fail unless the network has this size")
    wan.add_argument("--vae_path", help="video autoencoder")
    wan.add_argument("--text_encoder_path", help="umT5")
    wan.add_argument("--tokenizer_path", help="its tokenizer.json or spiece.model, or their folder")
    wan.add_argument(
        "--num_heads", type=int, help="of the network, where they are not 128 wide and no config.json says"
    )
    wan.add_argument("--round_time_to", choices=("none", "bfloat16"), help="default: the file's; bfloat16 for rCM's")
    wan.add_argument("--resolution", help="480p (default) or 720p")
    wan.add_argument("--aspect_ratio", help="1:1, 4:3, 3:4, 16:9 (default) or 9:16")
    wan.add_argument("--size", metavar="WxH", help="width and height in pixels instead of the two")
    wan.add_argument("--adaptive_resolution", action="store_true", default=None, help="the image's proportions")
    wan.add_argument("--dtype", choices=("bfloat16", "float32"), help="of weights and products (default bfloat16)")
    wan.add_argument("--vae_dtype", choices=("bfloat16", "float32"), help="of the decoder (default float32)")
    return p


# --- what the flags mean --------------------------------------------------------------------------------------------


def schedule_from(args: argparse.Namespace, info: "ModelInfo") -> "RolloutSchedule":
    """The file's own schedule with what the flags change. Flags of the other kind of sampling are errors."""
    from rcm_jax.sampling.schedules import MIDDLE, few_step_schedule, ode_schedule
    from rcm_jax.training.runs import causal_schedule

    distilled = args.distilled or info.kind == "student"
    for flag in ("guidance_scale", "timestep_shift") if distilled else ("mid_t", "steps_per_chunk", "mid_t_schedules"):
        if getattr(args, flag) is not None:
            kinds = "an ODE; the network is sampled in few steps" if distilled else "--distilled sampling"
            raise ValueError(f"--{flag} is for {kinds}")
    if args.mid_t_schedules is not None and args.steps_per_chunk is None:
        raise ValueError("--mid_t_schedules needs --steps_per_chunk: one list of times an entry")
    if args.context_from_last_step_start_chunk is not None and not args.context_from_last_step:
        raise ValueError("--context_from_last_step_start_chunk needs --context_from_last_step")

    sigma_max, guidance = (info.sigma_max, info.guidance) if info.causal else (SIGMA_MAX, GUIDANCE)
    sigma_max = sigma_max if args.sigma_max is None else args.sigma_max
    shift = 3.0 if args.timestep_shift is None else args.timestep_shift
    if not (sigma_max > 0 and shift > 0):
        raise ValueError(f"--sigma_max={sigma_max} and --timestep_shift={shift} must be above 0")
    own = info.causal.get("noisy_context_from", -1) if distilled else -1
    if not distilled:
        schedule = ode_schedule(
            50 if args.num_steps is None else args.num_steps, shift=shift, sigma_max=sigma_max,
            guidance=guidance if args.guidance_scale is None else args.guidance_scale,
        )  # fmt: skip
    elif args.mid_t is None and args.steps_per_chunk is None:
        schedule = causal_schedule(dataclasses.replace(info, kind="student", sigma_max=sigma_max), args.num_steps)
    else:
        middle = MIDDLE if args.mid_t is None else times(" ".join(args.mid_t), "mid_t")
        lists = args.mid_t_schedules
        schedule = few_step_schedule(
            args.steps_per_chunk or [len(middle) + 1 if args.num_steps is None else args.num_steps], middle=middle,
            middle_by_entry=None if lists is None else [times(x, "mid_t_schedules") for x in lists.split(";")],
            sigma_max=sigma_max,
        )  # fmt: skip
    if args.context_from_last_step is not None:
        own = (args.context_from_last_step_start_chunk or 0) if args.context_from_last_step else -1
    schedule = dataclasses.replace(schedule, noisy_context_from=None if own < 0 else own)
    return schedule.after_image() if args.image_path else schedule


def network_from(args: argparse.Namespace, info: "ModelInfo", mesh: "Mesh") -> "CausalDiT":
    """The causal network for videos of the latent shape of `info`."""
    from rcm_jax.chunks import ChunkPattern
    from rcm_jax.parallel import sharded_attention
    from rcm_jax.training.runs import causal_network

    if not info.causal and None in (args.first_chunk_t, args.chunk_t):
        raise ValueError("the file does not say its chunk pattern: give --first_chunk_t and --chunk_t")
    own = ChunkPattern.parse(info.causal.get("pattern", "c1-1"))
    pattern = ChunkPattern(
        own.first if args.first_chunk_t is None else args.first_chunk_t,
        own.rest if args.chunk_t is None else args.chunk_t,
    )
    asked = {"pattern": str(pattern), "window": args.window, "sink": args.sink}
    causal = info.causal | {name: value for name, value in asked.items() if value is not None}
    return causal_network(dataclasses.replace(info, causal=causal), sharded_attention(mesh))


class Opened(NamedTuple):
    """A file and what is beside it, read but for the weights."""

    info: "ModelInfo"  # with the latent shape of the video that is asked for
    surroundings: "Callable[[bool], Surroundings]"  # (whether guidance needs the negative prompt)
    load: "Callable[[Mesh], Params]"


def open_toy(args: argparse.Namespace, path: Path) -> Opened:
    from rcm_jax.model_file import load_model, read_info
    from rcm_jax.parallel import shard
    from rcm_jax.sampling.causal_world import toy_surroundings

    if given := [f"--{name}" for name in WAN_FLAGS if getattr(args, name) is not None]:
        raise ValueError(f"{', '.join(given)} does not apply: {path} is of the built-in world")
    info = read_info(path)
    frames = args.num_frames or info.latent_shape[0]  # the toy's latents are its frames
    return Opened(
        dataclasses.replace(info, latent_shape=(frames, *info.latent_shape[1:])),
        lambda guided: toy_surroundings(
            args.prompt or TOY_PROMPT, args.negative_prompt or "", num_samples=args.num_samples,
            image_path=args.image_path,
        ),
        lambda mesh: shard(load_model(path)[0], mesh),
    )  # fmt: skip


def open_wan(args: argparse.Namespace, path: Path) -> Opened:
    from rcm_jax.convert.commands import info_for
    from rcm_jax.media.sizes import latent_shape
    from rcm_jax.sample import WAN_PROMPT, video_size
    from rcm_jax.sampling.causal_world import wan_size, wan_surroundings
    from rcm_jax.worlds.wan.files import load, open_files, takes_image

    size = video_size(args)
    files = open_files(
        [path], vae=args.vae_path, text=args.text_encoder_path, tokenizer=args.tokenizer_path,
        model_size=args.model_size, num_heads=args.num_heads,
    )  # fmt: skip
    kind, dtype = "student" if args.distilled else None, args.dtype or "bfloat16"
    info = info_for(files.dit[0], files.dit[0], argparse.Namespace(kind=kind, round_time_to=args.round_time_to))
    if takes_image(info.model):
        raise ValueError(f"{path} takes an image in its channels; a causal network takes it as its first chunk")
    vae, patch = files.vae.config, info.model.patch_size[1]
    size = wan_size(size, args.image_path, adaptive=bool(args.adaptive_resolution), step=vae.space * patch)
    frames = args.num_frames or (vae.time * (info.latent_shape[0] - 1) + 1 if info.causal else WAN_FRAMES)
    shape = latent_shape(size, frames, space=vae.space, time=vae.time, patch=patch)
    model = dataclasses.replace(info.model, dtype=dtype, remat=False)
    return Opened(
        dataclasses.replace(info, model=model, latent_shape=shape),
        lambda guided: wan_surroundings(
            files, args.prompt or WAN_PROMPT, args.negative_prompt or "", num_samples=args.num_samples, size=size,
            dtype=dtype, vae_dtype=args.vae_dtype or "float32", guided=guided, image_path=args.image_path,
        ),
        lambda mesh: load(files.dit[0], mesh, dtype=dtype),
    )  # fmt: skip


# --- the command ----------------------------------------------------------------------------------------------------


def report(runs: "list[Profile]", network: "CausalDiT", included: str) -> str:
    """Means over the timed runs."""
    import jax

    def mean(name: str) -> float:
        return float(np.mean([getattr(run, name) for run in runs]))

    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        memory = f"{stats['peak_bytes_in_use'] / 2**30:.2f} GiB on {jax.devices()[0].device_kind}"
    else:  # the host's own devices keep no count
        unit = 1 if sys.platform == "darwin" else 1024
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of this process"
    first, rest = network.pattern.first, network.pattern.rest
    return "\n".join([
        f"first decoded frame   {mean('first'):.3f} s (a first chunk of {first} latent frames)",
        f"a further chunk       {mean('chunk'):.3f} s ({rest} latent frames)",
        f"steady rate           {mean('rate'):.1f} frames a second of every video",
        f"included              {included}",
        f"peak memory           {memory}",
        f"runs                  {len(runs)}",
    ])  # fmt: skip


def check_counts(args: argparse.Namespace) -> None:
    for name, low in (("num_samples", 1), ("num_runs", 1), ("warmup_iters", 0)):
        if getattr(args, name) < low:
            raise ValueError(f"--{name}={getattr(args, name)} must be at least {low}")
    if args.num_frames is not None and args.num_frames < 1:
        raise ValueError(f"--num_frames={args.num_frames} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed={args.seed} must be at least 0 and below 2**32")
    if args.model and args.dit_path:
        raise ValueError("give --model or --dit_path, not both")


def run(args: argparse.Namespace) -> Path:
    import jax

    from rcm_jax.media.pictures import enlarge, grid, to_uint8
    from rcm_jax.media.video import GrowingVideo, mp4_path, write_video
    from rcm_jax.parallel import sampling_mesh
    from rcm_jax.sample import is_toy
    from rcm_jax.sampling.generate_causal import video_noises
    from rcm_jax.sampling.stream import profile, stream
    from rcm_jax.worlds.builtin import find_model

    check_counts(args)
    mp4_path(args.save_path)
    path = find_model(args.dit_path or "toy_causal")
    opened = (open_toy if is_toy(path) else open_wan)(args, path)
    mesh = sampling_mesh(args.fsdp, args.sequence, opened.info.model.num_heads)
    network, schedule = network_from(args, opened.info, mesh), schedule_from(args, opened.info)
    chunks = len(network.pattern.spans(network.frames))
    schedule.check_chunks(chunks)
    around, params = opened.surroundings(schedule.guidance > 1), opened.load(mesh)
    noises = video_noises(network, schedule, args.seed, range(args.num_samples))

    def start():
        return stream(
            network, params, around.text, noises, schedule, around.decode, chunks=chunks, null_text=around.null_text,
            image=around.image,
        )  # fmt: skip

    def picture(part: np.ndarray) -> np.ndarray:
        return to_uint8(enlarge(grid(part[None]), around.scale))

    with jax.set_mesh(mesh):
        for _ in range(args.warmup_iters):
            profile(start)
        timed = [profile(start)[1] for _ in range(args.num_runs - 1)]
        if args.stream:
            with GrowingVideo(args.save_path, around.fps) as video:
                _, last = profile(start, lambda part: video.append(picture(part)))
        else:
            parts, last = profile(start)
            write_video(args.save_path, picture(np.concatenate(parts, axis=1)), around.fps)
    if args.profile or args.warmup_iters or timed:
        steps = ["the prompt's keys", "network", "decoder", "copy to the host"]
        steps += ["writing the MP4 (last run)"] * args.stream + ["compilation (first run)"] * (not args.warmup_iters)
        print(report([*timed, last], network, ", ".join(steps) + "; not: text encoder, loading"))
    return args.save_path


def main(argv: Sequence[str] | None = None) -> None:
    """The command; installed as rcm-sample-causal."""
    args = parser().parse_args(argv)
    with one_line_errors():
        print(run(args))


if __name__ == "__main__":
    main()
