"""Scores of videos of the built-in world, measured from their pixels: no network judges them.

The shape is found by its colourfulness. Under soft edges a pixel is background + coverage * (colour - background) and
the background is grey, so its chroma (RGB less its own mean) is coverage * chroma of the shape, at any background
brightness. From the estimated coverage follow area, centre, overlap with ideal shapes and the path over time.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from rcm_jax.worlds import toy

MIN_CHROMA = 0.3  # a colourful region is fainter than this: there is no shape (palette 0.9 to 1.3, background 0)
MIN_AREA = 12.0  # pixels; the smallest shape of the world has 50
MIN_SPEED = 0.3  # pixels a frame; the world's slowest is 0.8
MIN_OVERLAP = 0.5  # with its best ideal shape, for a region to be a shape at all; speckles of noise stay below
CHUNK = 128  # videos measured at a time, to bound the memory
MARGIN = 3  # pixels around the shape that do not count as background: as far as a patch of the codec smears an edge

Record = dict[str, np.ndarray]
Interval = dict[str, float | None]
Summary = dict[str, Interval]

# --- one record a video ---------------------------------------------------------------------------------------------


def measure(videos: Float[np.ndarray, "B F H W 3"], captions: Sequence[str]) -> Record:
    """Measures every video on its own against its caption.

    Returns arrays [B]: the booleans `found`, `colour`, `shape`, `direction` (right as captioned) and `all` three;
    `overlap` (IoU with the best ideal shape of the same area and centre, mean over frames), `noise` (standard
    deviation of the background around its mean of the frame, in units of [-1, 1]), `jitter` (standard deviation of
    sqrt(area) over the frames, relative to its mean), `x`, `y` (mean centre, pixels), `radius` (of the circle of the
    mean area, pixels). Where no shape is found the booleans are False, and jitter, x, y and radius are NaN.
    """
    videos, shape = np.asarray(videos), (toy.FRAMES, toy.SIZE, toy.SIZE, 3)
    if videos.shape[1:] != shape or not 0 < len(videos) == len(captions):
        raise ValueError(f"videos are {shape}, one a caption, at least one; got {videos.shape} and {len(captions)=}")
    wanted = [toy.Caption.parse(c) for c in captions]
    parts = [slice(i, i + CHUNK) for i in range(0, len(wanted), CHUNK)]
    records = [_measure(videos[part], wanted[part]) for part in parts]
    return {name: np.concatenate([r[name] for r in records]) for name in records[0]}


def _measure(videos: Float[np.ndarray, "B F H W 3"], wanted: Sequence[toy.Caption]) -> Record:
    # A video of NaNs must score as a failure, not stop the evaluation.
    videos = np.clip(np.nan_to_num(videos.astype(np.float32), nan=0.0), -1, 1)
    core, cover = segment(videos)
    area = cover.sum((-2, -1))
    safe = np.maximum(area, MIN_AREA)
    edge = np.sqrt(safe)
    centre = np.stack([(cover * _grid("x")).sum((-2, -1)), (cover * _grid("y")).sum((-2, -1))], -1) / safe[..., None]
    overlaps = _overlaps(cover, centre, np.sqrt(safe / np.pi)).mean(1)  # [B, shapes]
    found = (area >= MIN_AREA).all(1) & (overlaps.max(1) >= MIN_OVERLAP)
    right = {
        "colour": found & (_colours(videos, core) == _indices(toy.COLOURS, [c.colour for c in wanted])),
        "shape": found & (overlaps.argmax(1) == _indices(toy.SHAPES, [c.shape for c in wanted])),
        "direction": found & (_directions(centre) == _indices(toy.DIRECTIONS, [c.direction for c in wanted])),
    }
    always = {"overlap": overlaps.max(1), "noise": _background_noise(videos, core)}
    if_found = {
        "jitter": edge.std(1) / edge.mean(1),
        "x": centre[..., 0].mean(1),
        "y": centre[..., 1].mean(1),
        "radius": np.sqrt(safe.mean(1) / np.pi),
    }
    everything = right["colour"] & right["shape"] & right["direction"]
    return {"found": found, **right, "all": everything, **always} | {
        name: np.where(found, value, np.nan) for name, value in if_found.items()
    }


def segment(
    videos: Float[np.ndarray, "B F H W 3"],
) -> tuple[Bool[np.ndarray, "B F H W"], Float[np.ndarray, "B F H W"]]:
    """The shape's pixels (more than half covered), and the coverage in [0, 1] of these and their neighbours."""
    chroma = videos - videos.mean(-1, keepdims=True)
    # a faint tint of the background is not the shape; the shape takes less than a fifth of the frame, a median stands
    chroma = chroma - np.median(chroma, axis=(-3, -2), keepdims=True)
    size = np.linalg.norm(chroma, axis=-1)
    # strength of the shape: the mean of the most colourful pixels, half as many as the smallest shape has
    strongest = np.partition(size.reshape(*size.shape[:2], -1), -25, axis=-1)[..., -25:].mean(-1)[..., None, None]
    present = strongest > MIN_CHROMA
    inner = (size > 0.75 * strongest) & present
    colour = (chroma * inner[..., None]).sum((-3, -2)) / np.maximum(inner.sum((-2, -1)), 1)[..., None]
    along = np.einsum("bfhwc,bfc->bfhw", chroma, colour) / np.maximum((colour**2).sum(-1), 1e-6)[..., None, None]
    # lone pixels of noise are not the shape; the tips of a diamond, lost here too, come back as neighbours
    dense = ndimage.uniform_filter(np.clip(along, 0, 1), size=(1, 1, 3, 3), mode="constant") > 0.4
    core = (along > 0.5) & dense & present
    near = _grow(core, 1)
    return core, np.clip(along, 0, 1) * near


def _overlaps(
    cover: Float[np.ndarray, "B F H W"], centre: Float[np.ndarray, "B F 2"], radius: Float[np.ndarray, "B F"]
) -> Float[np.ndarray, "B F shapes"]:
    """Soft intersection over union with the ideal shapes, each of the same area and centre."""
    out = []
    for shape in toy.SHAPES:
        ideal = toy.coverage(shape, centre, radius)
        both = np.minimum(cover, ideal).sum((-2, -1))
        out.append(both / (cover.sum((-2, -1)) + ideal.sum((-2, -1)) - both))
    return np.stack(out, -1)


def _colours(videos: Float[np.ndarray, "B F H W 3"], core: Bool[np.ndarray, "B F H W"]) -> np.ndarray:
    """The palette's entry nearest to the mean colour of the shape's pixels, all frames together."""
    mean = (videos * core[..., None]).sum((1, 2, 3)) / np.maximum(core.sum((1, 2, 3)), 1)[:, None]
    palette = np.array(list(toy.COLOURS.values()))
    return np.linalg.norm(mean[:, None, :] - palette, axis=-1).argmin(1)


def _directions(centre: Float[np.ndarray, "B F 2"]) -> np.ndarray:
    """The direction of the straight line fitted to the path; -1 where it hardly moves or moves at a slant."""
    time = np.arange(toy.FRAMES) - (toy.FRAMES - 1) / 2
    velocity = np.einsum("bfc,f->bc", centre, time) / (time**2).sum()
    speeds = velocity @ np.array(list(toy.DIRECTIONS.values())).T  # [B, directions]
    straight = np.abs(velocity).max(1) > 2 * np.abs(velocity).min(1)
    return np.where(straight & (speeds.max(1) > MIN_SPEED), speeds.argmax(1), -1)


def _background_noise(videos: Float[np.ndarray, "B F H W 3"], core: Bool[np.ndarray, "B F H W"]) -> np.ndarray:
    outside = ~_grow(core, MARGIN)[..., None]
    count = np.maximum(outside.sum((2, 3), keepdims=True), 1)
    mean = (videos * outside).sum((2, 3), keepdims=True) / count
    square = ((videos - mean) ** 2 * outside).sum((2, 3), keepdims=True) / count
    return np.sqrt(square.mean((1, 2, 3, 4)))


def _grow(mask: Bool[np.ndarray, "B F H W"], pixels: int) -> Bool[np.ndarray, "B F H W"]:
    width = 2 * pixels + 1
    return ndimage.maximum_filter(mask.view(np.uint8), size=(1, 1, width, width)).view(bool)


def _grid(axis: str) -> Float[np.ndarray, "H W"]:
    line = np.arange(toy.SIZE, dtype=np.float32)
    return np.broadcast_to(line if axis == "x" else line[:, None], (toy.SIZE, toy.SIZE))


def _indices(names: Mapping[str, object], values: Sequence[str]) -> np.ndarray:
    order = list(names)
    return np.array([order.index(v) for v in values])


# --- many videos: means, spreads, bootstrap intervals ---------------------------------------------------------------

MEANS = ("found", "colour", "shape", "direction", "all", "overlap", "noise", "jitter")
COLUMNS = ("all", "colour", "shape", "direction", "overlap", "noise", "jitter", "position_spread", "size_spread")
SPREADS = {"position_spread": ("x", "y"), "size_spread": ("radius",)}


def score(
    videos: Float[np.ndarray, "B F H W 3"],
    captions: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Summary:
    """Means over the videos, and how much videos of one caption differ, each with a bootstrap interval of 95%.

    The spreads are standard deviations in pixels of place (root of the mean variance of x and y) and radius, from the
    variance within `groups` (the captions, unless given) pooled over the groups; `*_ratio` divides them by the
    world's own for these captions. Only videos with a shape take part in the spreads. The means are resampled
    over all videos, the spreads within the groups. A value that cannot be measured (spread of single videos, jitter
    without any shape) is None. All else is plain floats, so that the summary goes into JSON.
    """
    record = measure(videos, captions)
    groups = np.asarray(captions if groups is None else groups)
    summary = {}
    for name in MEANS:
        known = np.isfinite(record[name])
        values, draw = record[name][known].astype(float), _Resampler(np.zeros(known.sum()), resamples, seed)
        summary[name] = _interval(*draw.mean(values))

    found = record["found"]
    draw = _Resampler(groups[found], resamples, seed)
    world = world_spread(list(captions))
    for name, columns in SPREADS.items():
        values = np.stack([record[c][found] for c in columns], -1)
        value, boots = draw.spread(values)
        summary[name] = _interval(value, boots)
        summary[name.replace("spread", "ratio")] = _interval(value / world[name], boots / world[name])
    return summary


def diversity(videos: Float[np.ndarray, "B F H W 3"], captions: Sequence[str]) -> dict[str, float | None]:
    """Only the spreads of `score` and their ratios to the world's, without intervals."""
    names = [n for spread in SPREADS for n in (spread, spread.replace("spread", "ratio"))]
    summary = score(videos, captions, resamples=1)
    return {name: summary[name]["value"] for name in names}


def world_spread(captions: Sequence[str]) -> dict[str, float]:
    """The spreads of the world itself for these captions, exactly, from how `toy.scenes` draws."""
    place = np.mean([_place_variance(toy.Caption.parse(c)) for c in captions])
    return {"position_spread": float(np.sqrt(place)), "size_spread": float(np.sqrt(_uniform(*toy.RADIUS)[1]))}


def _place_variance(caption: toy.Caption) -> float:
    # The middle of the path is uniform in [-room, room] along each axis: its variance is E[room²] / 3.
    (radius, radius_var), (speed, speed_var) = _uniform(*toy.RADIUS), _uniform(*toy.SPEED)
    extent = toy.SHAPES[caption.shape]
    steps = np.abs(toy.DIRECTIONS[caption.direction]) * (toy.FRAMES - 1) / 2
    room = toy.SIZE / 2 - extent * radius - steps * speed
    return float((room**2 + extent**2 * radius_var + steps**2 * speed_var).mean() / 3)


def _uniform(low: float, high: float) -> tuple[float, float]:
    return (low + high) / 2, (high - low) ** 2 / 12


class _Resampler:
    """Bootstrap within groups: every resample draws from each group as many videos as the group has."""

    def __init__(self, groups: np.ndarray, resamples: int, seed: int):
        _, self.group, counts = np.unique(groups, return_inverse=True, return_counts=True)
        self.count = counts[self.group]  # of the group that each video is in
        order = np.argsort(self.group, kind="stable")
        start = (np.cumsum(counts) - counts)[self.group]
        draws = np.random.default_rng(seed).random((resamples, len(groups)))
        self.index = order[start + np.floor(draws * self.count).astype(int)]

    def mean(self, values: Float[np.ndarray, " B"]) -> tuple[float, Float[np.ndarray, " R"]]:
        """Of the videos and of each resample; NaN if there are none."""
        return (values.mean(), values[self.index].mean(1)) if len(values) else (np.nan, np.zeros(0))

    def spread(self, values: Float[np.ndarray, "B columns"]) -> tuple[float, Float[np.ndarray, " R"]]:
        """Root of the variance within groups, pooled over groups and columns; NaN if no group has two videos."""
        freedom = (1 - 1 / self.count).sum() if len(self.count) else 0  # the sum over groups of (n - 1)
        if not freedom:
            return np.nan, np.zeros(0)
        raw = self._squares(values[None]).mean(-1)
        # A group of n resampled from itself has (n-1)/n of its variance: without n/(n-1) the interval would sit low.
        weight = self.count / np.maximum(self.count - 1, 1)
        boots = self._squares(values[self.index]).mean(-1) * weight
        return float(np.sqrt(raw.sum() / freedom)), np.sqrt(boots.sum(1) / freedom)

    def _squares(self, values: Float[np.ndarray, "R B columns"]) -> Float[np.ndarray, "R B columns"]:
        """Squared distances of the videos to the mean of their group; position j belongs to the group of video j."""
        member = self.group == np.arange(self.group.max() + 1)[:, None]  # [groups, B]
        means = np.einsum("gb,rbc->rgc", member / member.sum(1, keepdims=True), values)
        return (values - means[:, self.group]) ** 2


def _interval(value: float, boots: Float[np.ndarray, " R"]) -> Interval:
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    low, high = np.quantile(boots, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}


# --- protocol and table ---------------------------------------------------------------------------------------------


def evaluation_prompts(per_caption: int = 8, captions: int = 48) -> list[str]:
    """A balanced list of per_caption * captions prompts, one of each caption in turn: a prefix is nearly balanced too.

    48 is every caption; 12 is every colour with every shape, with each direction as often as the others.
    """
    if captions == 48:
        chosen = toy.captions()
    elif captions == 12:
        pairs = [(i, c, s) for i, c in enumerate(toy.COLOURS) for s in toy.SHAPES]
        directions, shapes = list(toy.DIRECTIONS), list(toy.SHAPES)
        chosen = [str(toy.Caption(c, s, directions[(i + shapes.index(s)) % len(directions)])) for i, c, s in pairs]
    else:
        raise ValueError(f"{captions=}: the balanced sets have 12 or 48 captions")
    return chosen * per_caption


def format_table(
    rows: Mapping[str, Summary],
    columns: Sequence[str] = COLUMNS,
    *,
    first: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """A text table: a row a summary; in each cell the value and its interval, as "0.95 0.93-0.97".

    first: columns before these, {heading: {label of a row: its cell}}; a row that is not among them has "-"."""
    first = first or {}
    cells = [["", *first, *(name.replace("_", " ") for name in columns)]]
    for label, summary in rows.items():
        told = [column.get(label, "-") for column in first.values()]
        cells.append([label, *told, *(_cell(summary.get(name)) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(interval: Interval | None) -> str:
    if interval is None or interval["value"] is None:
        return "-"
    digits = 3 if max(interval["value"], interval["high"]) < 0.1 else 2
    return "{value:.{d}f} {low:.{d}f}-{high:.{d}f}".format(**interval, d=digits)
