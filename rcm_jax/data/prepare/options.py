"""What the commands that make sets can be told."""

import dataclasses
from pathlib import Path

from rcm_jax.errors import ArgumentError
from rcm_jax.media.clips import CUT
from rcm_jax.media.sizes import parse_size, table_size
from rcm_jax.options import ShareOptions, check_options, option
from rcm_jax.ranges import POSITIVE, Range, at_least

FPS = 16  # of the published networks
NUM_FRAMES = 81  # of the published set


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetOptions(ShareOptions):
    """Where a set goes, and who makes which part of it."""

    out: Path = option(Path(), "folder of the set; the same command goes on where it was stopped", required=True)
    samples_per_shard: int = option(32, "samples of a file (default 32)", range=at_least(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """The published encoders; what is not named is looked for beside the autoencoder and in checkpoints/."""

    vae_path: str | None = option(None, "video autoencoder, or a folder with it as it is published", also=("vae",))
    text_encoder_path: str | None = option(None, "umT5", also=("text_encoder",))
    tokenizer_path: str | None = option(
        None, "its tokenizer.json or spiece.model, or their folder", also=("tokenizer",)
    )
    image_encoder_path: str | None = option(
        None, "CLIP, for image-to-video networks that take its tokens", also=("clip",)
    )
    vae_dtype: str = option(
        "float32", "that the autoencoder computes in (default float32)", choices=("bfloat16", "float32")
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """What is taken of a folder's videos."""

    captions: Path | None = option(
        None, "table of path and caption (.csv, .tsv, .jsonl); else NAME.txt or NAME.json beside each video"
    )
    num_frames: int = option(NUM_FRAMES, "frames of a clip, 4k + 1 (default 81)", range=at_least(1))
    fps: float = option(FPS, "frames a second (default 16, as the networks were trained)", range=POSITIVE)
    resolution: str | None = option(None, "480p (default) or 720p")
    aspect_ratio: str | None = option(None, "1:1, 4:3, 3:4, 16:9 (default) or 9:16")
    size: str | None = option(None, "width and height in pixels instead of the two", metavar="WxH")
    scene_cuts: str = option(
        "keep",
        "keep (default): the clip is the beginning; skip: of the longest run without a cut, and a video without a run "
        "that is long enough is left out",
        choices=("keep", "skip"),
    )
    cut_threshold: float = option(
        CUT, f"of --scene_cuts skip: mean difference of neighbouring frames' 16x16 thumbnails, 0 to 1 (default {CUT})",
        range=Range(0, 1),
    )  # fmt: skip
    i2v: bool = option(False, "for image-to-video networks: the first frame's condition too; --clip adds its tokens")
    skip_bad: bool = option(False, "leave out what cannot be used; the manifest names it")

    def __post_init__(self) -> None:
        check_options(self)
        if self.captions is not None and self.captions.suffix not in (".csv", ".tsv", ".jsonl"):
            raise ArgumentError("{captions} must end in .csv, .tsv or .jsonl", captions=self.captions)

    @property
    def pixels(self) -> tuple[int, int]:
        """(width, height)."""
        if self.size is None:
            return table_size(self.resolution or "480p", self.aspect_ratio or "16:9")
        if self.resolution or self.aspect_ratio:
            raise ArgumentError(
                "give {size}, or {resolution} and {aspect_ratio}", size=None, resolution=None, aspect_ratio=None
            )
        return parse_size(self.size)

    @property
    def cut(self) -> float | None:
        return self.cut_threshold if self.scene_cuts == "skip" else None
