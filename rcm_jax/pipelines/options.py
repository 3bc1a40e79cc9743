"""What a pipeline can be told: names, types, defaults and help of every argument, for Python and for the commands."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from rcm_jax.convert.checkpoint import NetworkOptions
from rcm_jax.errors import ArgumentError
from rcm_jax.hub import Place
from rcm_jax.media.video import MAX_FPS, MIN_FPS
from rcm_jax.options import check_options, option
from rcm_jax.pipelines.kinds import BIDIRECTIONAL, WAN, causal
from rcm_jax.pipelines.policy_options import PolicyOptions
from rcm_jax.pipelines.quant_options import QuantOptions
from rcm_jax.pipelines.stream_batch_options import StreamBatchOptions
from rcm_jax.ranges import POSITIVE, Range, at_least, between
from rcm_jax.sampling.noise_control import RULES
from rcm_jax.sampling.recache import RECACHES
from rcm_jax.worlds.wan.files import SIZES

SOLVERS = ("euler", "unipc", "dpm++", "wan_unipc", "wan_dpm++")
PRECISIONS = ("bfloat16", "float32")
DECODERS = ("full", "tiny")
# of `SamplingOptions`, what commands that make many videos do not take
OF_ONE_VIDEO = (
    "num_samples", "indices", "image_path", "prompts_file", "video_path",
    *(field.name for field in dataclasses.fields(StreamBatchOptions)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileOptions(NetworkOptions):
    """Arguments of `load`: which files, and how they lie in memory."""

    dit_path: str | Place = option(
        "toy", "file or folder of the network, ours or anybody's, or on the Hugging Face hub (org/name, "
        "hf://org/name@revision/file); 'toy' is the built-in teacher, 'toy_causal' the built-in causal student",
    )  # fmt: skip
    model_size: str | None = option(None, "fail unless the network has this size", choices=tuple(SIZES), only=[WAN])
    second_dit_path: str | None = option(
        None, "Wan2.2: the network for less noise; --dit_path is that for more", only=[WAN, BIDIRECTIONAL]
    )
    lora: Sequence[str] | None = option(
        None, "LoRA files that are added while the network is loaded, FILE or FILE:STRENGTH each", nargs="+", type=str,
        metavar="FILE[:STRENGTH]",
    )  # fmt: skip
    second_lora: Sequence[str] | None = option(
        None, "those of --second_dit_path", nargs="+", type=str, metavar="FILE[:STRENGTH]", only=[WAN, BIDIRECTIONAL]
    )
    lora_skip: str | None = option(None, "pattern of their layers that are left out, like 'k_img|v_img|img_emb'")
    boundary: float | None = option(
        None,
        "Wan2.2: time at which they change (0.875; 0.9 from an image)",
        only=[WAN, BIDIRECTIONAL],
        range=between(0, 1),
    )
    vae_path: str | None = option(None, "video autoencoder", only=[WAN])
    text_encoder_path: str | None = option(None, "umT5", only=[WAN])
    tokenizer_path: str | None = option(None, "its tokenizer.json or spiece.model, or their folder", only=[WAN])
    image_encoder_path: str | None = option(
        None, "CLIP, for the networks that take its tokens", only=[WAN, BIDIRECTIONAL]
    )
    dtype: str | None = option(None, "of weights and products (default bfloat16)", choices=PRECISIONS, only=[WAN])
    vae_dtype: str | None = option(
        None, "of the autoencoder (default: decoders bfloat16 on GPUs, float32 on CPUs; encoders float32)",
        choices=PRECISIONS, only=[WAN],
    )  # fmt: skip
    decoder: str = option(
        "full", "of frames: full is the autoencoder's; tiny, TAEW2.1, rougher for a small part of time and memory",
        choices=DECODERS, only=[WAN],
    )  # fmt: skip
    tiny_vae_path: str | None = option(None, "TAEW2.1, for --decoder tiny", only=[WAN])
    vae_tiling: bool = option(False, "decode in tiles: less memory", only=[WAN, BIDIRECTIONAL])
    fsdp: int = option(1, "GPUs that share the network's weights (default 1)", range=at_least(1))
    sequence: int = option(1, "GPUs that share a video's tokens, and a cache's heads (default 1)", range=at_least(1))
    first_chunk_t: int | None = causal(
        None, "latent frames of the first chunk (default: the file's)", range=at_least(1)
    )
    chunk_t: int | None = causal(None, "latent frames of the others (default: the file's)", range=at_least(1))

    def __post_init__(self) -> None:
        check_options(self)
        for name, of in (("second_lora", "second_dit_path"), ("lora_skip", "lora")):
            if getattr(self, name) is not None and getattr(self, of) is None:
                raise ArgumentError(f"{{{name}}} needs {{{of}}}", **{name: None, of: None})
        if self.decoder == "full" and self.tiny_vae_path is not None:
            raise ArgumentError(
                "{tiny_vae_path} is the tiny decoder's: give {decoder} tiny too", tiny_vae_path=self.tiny_vae_path,
                decoder=None,
            )  # fmt: skip
        if self.decoder == "tiny" and self.vae_tiling:
            raise ArgumentError(
                "{vae_tiling} is for the full decoder; {decoder} needs no tiles", vae_tiling=None, decoder="tiny"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions(PolicyOptions, QuantOptions, StreamBatchOptions):
    """Arguments of a call. `indices` are the numbers of the videos' noises where they are not 0, 1, … for each prompt;
    `negative_prompt` may be one for all prompts or one a prompt. `prompts_file` may be the pairs themselves,
    [(0, "a red fox"), (12.5, "it begins to snow")]."""

    negative_prompt: str | Sequence[str] | None = option(None, "what guidance leads away from (default: no text)")
    image_path: str | Path | None = option(
        None, "first frame: of image-to-video networks and TI2V-5B, or a causal network's first chunk"
    )
    prompts_file: str | Path | Sequence[tuple[float, str]] | None = causal(
        None, "prompts that change, in place of the one: lines like '12.5: it begins to snow', in seconds of the video "
        "at the world's own rate, the first at 0; each holds from the first chunk that begins at its time or later",
    )  # fmt: skip
    prompt_blend: int = causal(
        1, "chunks over which a new prompt takes the old one's place (default 1: at once)",
        range=at_least(1),
    )  # fmt: skip
    prompt_recache: str | None = causal(
        None, "where the prompt changes, keys of the past are computed again under the new one: all, or keep_sink, all "
        "but the sink's", choices=RECACHES,
    )  # fmt: skip
    video_path: str | Path | None = causal(
        None, "video to repaint, chunk by chunk, as the prompt says; cut to the network's size and rate"
    )
    noise_scale: float | None = causal(
        None, "of the input: how much of each chunk is noise to begin with, and free to change (0.8)",
        range=Range(0, 1, open=True),
    )  # fmt: skip
    noise_rule: str | None = causal(
        None, "of the input: fixed (default); motion, less noise where more moves; published, StreamDiffusionV2's "
        "motion and times", choices=RULES,
    )  # fmt: skip
    num_samples: int = option(1, "videos of a prompt, side by side in one file (default 1)", range=at_least(1))
    seed: int = option(
        0,
        "sample i of a prompt and a seed is the same in every run and every batch (default 0)",
        range=between(0, 2**32 - 1),
    )
    indices: Sequence[int] | None = None
    noise_pattern: str | None = option(
        None, "draw the noise as a causal network of these chunks does, like c1-2: both at equal noise",
        only=[BIDIRECTIONAL],
    )  # fmt: skip
    num_frames: int | None = option(
        None, "frames (default: the file's; of Wan's 77, TI2V-5B's 121, causal 81; 4k + 1 of these)", range=at_least(1)
    )
    resolution: str | None = option(None, "480p (default) or 720p (default of TI2V-5B)", only=[WAN])
    aspect_ratio: str | None = option(None, "1:1, 4:3, 3:4, 16:9 (default) or 9:16", only=[WAN])
    size: str | None = option(None, "width and height in pixels instead of the two", metavar="WxH", only=[WAN])
    adaptive_resolution: bool = option(False, "the image's proportions", only=[WAN])
    batch_size: int | None = option(
        None, "videos at a time (default: as many as --fsdp)", only=[BIDIRECTIONAL], range=at_least(1)
    )

    num_steps: int | None = option(
        None, "network calls of a video or chunk: 1 to 4 of a student, any of a teacher (50)"
    )
    sigma_max: float | None = option(
        None,
        "first noise level (default: the file's, 80 for rCM, 1600 for causal)",
        range=Range(0, open=True, infinite=True),
    )
    mid_t: Sequence[float] | str | None = option(
        None, "times between a student's first step and the data (causal: 15/16 5/6 5/8; else 0.934 0.853 0.609)",
        nargs="*", type=str,
    )  # fmt: skip
    sampler: str | None = option(None, "of a teacher (unipc)", choices=SOLVERS, only=[BIDIRECTIONAL])
    guidance_scale: float | None = option(
        None, "classifier-free guidance of a teacher (default: the file's)", range=at_least(0)
    )
    shift: float | None = option(
        None, "time shift of a teacher's schedule (default 5, causal 3)", also=("timestep_shift",), range=POSITIVE
    )  # fmt: skip

    window: int | None = causal(None, "chunks that stay visible, the current one included; 0: all", range=at_least(0))
    sink: int | None = causal(None, "first chunks that always stay visible", range=at_least(0))
    steps_per_chunk: Sequence[int] | None = causal(
        None, "steps of each chunk; the last repeats", nargs="+", type=int, range=at_least(1)
    )
    mid_t_schedules: Sequence[Sequence[float]] | str | None = causal(
        None, "the times between, one list an entry of --steps_per_chunk: '15/16,5/6,5/8;5/6'", type=str
    )
    context_from_last_step: bool | None = causal(
        None, "the last step gives the cache its keys, and a pass is saved (default: the file's)"
    )
    context_from_last_step_start_chunk: int | None = causal(None, "from this chunk on (default 0)", range=at_least(0))

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What a sampling command does with its videos."""

    prompt: str | None = option(None, "what to show")
    save_path: Path | None = option(None, ".mp4, .gif, or .png for a strip of frames (default: output/…)")
    fps: float | None = option(None, "frames a second of the file (the world's)", range=between(MIN_FPS, MAX_FPS))
    scale: int | None = option(None, "enlarges the toy world's 24 pixels for the eye (default 8)", range=at_least(1))
    again: Path | None = option(
        None, "make this file's video anew, beside it unless --save_path is given; other flags overrule what it says",
        metavar="VIDEO",
    )  # fmt: skip
    yes: bool = option(False, "go on where sampling takes over an hour")
    dry_run: bool = option(False, "compile for --gpu, say what a video or a chunk takes of its memory, and stop")
    gpu: str | None = option(None, "with --dry_run: h100, h200, a100, b200 or rtx_4090, which need not be here")

    def __post_init__(self) -> None:
        check_options(self)
        if self.dry_run != (self.gpu is not None):
            raise ArgumentError("{dry_run} and {gpu} go together", dry_run=None, gpu=self.gpu)

    @property
    def time_limit(self) -> float | None:
        """Seconds that sampling may take."""
        return None if self.yes else 3600.0

    def path(self, default: Path) -> Path:
        """Where the video goes."""
        return self.save_path or (self.again.with_stem(f"{self.again.stem}_again") if self.again else default)


@contextlib.contextmanager
def told_of_yes() -> Iterator[None]:
    """Around sampling under a time limit: its error says which flag lifts it."""
    try:
        yield
    except TimeoutError as error:
        raise TimeoutError(f"{error}; with --yes it goes on all the same") from error
