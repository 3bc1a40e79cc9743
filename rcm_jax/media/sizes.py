"""Sizes of videos: the published resolutions, and that of an image to start from."""

from rcm_jax.errors import ArgumentError

RESOLUTIONS: dict[str, dict[str, tuple[int, int]]] = {  # (width, height)
    "480p": {"1:1": (640, 640), "4:3": (640, 480), "3:4": (480, 640), "16:9": (832, 480), "9:16": (480, 832)},
    "720p": {"1:1": (960, 960), "4:3": (960, 720), "3:4": (720, 960), "16:9": (1280, 720), "9:16": (720, 1280)},
}
MAX_SIDE = 4096  # pixels: what players' and graphics cards' H.264 decoders take; libx264 itself ends at 16384


def table_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """(width, height). Raises ArgumentError that lists the table for what is not in it."""
    try:
        return RESOLUTIONS[resolution][aspect_ratio]
    except KeyError:
        table = "; ".join(
            f"{name}: " + ", ".join(f"{ratio} {w}x{h}" for ratio, (w, h) in sizes.items())
            for name, sizes in RESOLUTIONS.items()
        )
        raise ArgumentError(
            f"{{resolution}} with {{aspect_ratio}} is not one of {table}",
            resolution=resolution,
            aspect_ratio=aspect_ratio,
        ) from None


def parse_size(text: str) -> tuple[int, int]:
    """ "832x480" as (width, height)."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ArgumentError("{size} must be WIDTHxHEIGHT, like 832x480", size=text)
    return int(parts[0]), int(parts[1])


def adapted_size(image: tuple[int, int], area: int, step: int) -> tuple[int, int]:
    """The (width, height) in multiples of `step` with the proportions of an image and about `area` pixels."""
    width, height = image
    ratio = (width / height) ** 0.5
    return tuple(max(1, round(area**0.5 * side / step)) * step for side in (ratio, 1 / ratio))


def latent_shape(size: tuple[int, int], num_frames: int, *, space: int, time: int, patch: int) -> tuple[int, int, int]:
    """(T, H, W) of the latents of a video. Raises ArgumentError for a size or a number of frames that has none."""
    width, height = size
    step = space * patch
    if width < step or height < step or width % step or height % step:
        raise ArgumentError(
            f"{{size}} is not possible: width and height must be multiples of {step}", size=f"{width}x{height}"
        )
    if num_frames < 1 or (num_frames - 1) % time:
        below = max(num_frames - 1, 0) // time * time + 1
        raise ArgumentError(f"{{num_frames}} must be {time}k + 1: use {below} or {below + time}", num_frames=num_frames)
    return (num_frames - 1) // time + 1, height // space, width // space


def columns(videos: int, size: tuple[int, int], gap: int) -> int:
    """Of the grid that shows so many videos of (width, height) in one file, `gap` pixels apart: one row where no side
    exceeds MAX_SIDE, else rows of about one length. Raises ArgumentError that says how many fit."""
    across, down = ((MAX_SIDE + gap) // (side + gap) for side in size)
    if not across * down:
        raise ArgumentError(
            f"a video of {size[0]}x{size[1]} pixels does not fit a file: no side may have more than {MAX_SIDE}; give a "
            "smaller {size} or {scale}", size=None, scale=None,
        )  # fmt: skip
    if videos > across * down:
        raise ArgumentError(
            f"{{num_samples}}: {videos} videos of {size[0]}x{size[1]} do not fit a file of {MAX_SIDE}x{MAX_SIDE} "
            f"pixels, {across * down} do; take fewer or smaller ones, and the others with another {{seed}}",
            num_samples=None, seed=None,
        )  # fmt: skip
    rows = -(-videos // across)
    return -(-videos // rows)
