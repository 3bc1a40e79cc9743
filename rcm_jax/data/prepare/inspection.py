"""What is in a set of shards, and what is broken in it."""

import collections
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rcm_jax.data.prepare.sets import MANIFEST
from rcm_jax.data.sample import Sample
from rcm_jax.data.shard_files import Shard, find_shards, open_shard
from rcm_jax.errors import ArgumentError

SHOWN, NAMED, WIDTH = 3, 5, 40  # captions, keys of a line, columns of the histogram's longest bar
EDGES = np.linspace(-4, 4, 17)


@dataclasses.dataclass
class Found:
    """What was seen of a set's samples. bad: a line each."""

    shapes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    lengths: list[int] = dataclasses.field(default_factory=list)
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(EDGES) + 1, int))
    sums: list[np.ndarray] = dataclasses.field(default_factory=list)
    bad: list[str] = dataclasses.field(default_factory=list)

    def add(self, sample: Sample, place: str) -> None:
        self.shapes[" ".join(f"{n} {_shape(n, t)} {t.dtype}" for n, t in sample.tensors.items())] += 1
        wrong = [name for name, t in sample.tensors.items() if not np.isfinite(t.astype(np.float32)).all()]
        if wrong:
            self.bad.append(f"{place}: {', '.join(wrong)} NaN or infinite")
            return
        rows = np.flatnonzero(sample.text.astype(bool).any(axis=1))
        self.lengths.append(int(rows[-1]) + 1 if len(rows) else 0)
        if not len(rows):
            self.bad.append(f"{place}: its text is all zeros")
        numbers = sample.latents.astype(np.float64)
        self.counts += np.bincount(np.digitize(numbers.ravel(), EDGES), minlength=len(EDGES) + 1)
        flat = numbers.reshape(-1, numbers.shape[-1])
        self.sums.append(np.stack([np.full(flat.shape[1], len(flat)), flat.sum(0), (flat**2).sum(0)]))


def _shape(name: str, tensor: np.ndarray) -> str:
    return f"[L, {tensor.shape[1]}]" if name == "text" else str(list(tensor.shape))


def inspect_set(address: str, limit: int) -> tuple[list[str], list[str]]:
    """Lines of what there is and of what is broken. Numbers are those of `limit` samples, spread evenly (0: of all)."""
    addresses = find_shards(address)
    opened = [open_shard(one) for one in tqdm(addresses, "open", unit="shard", delay=2, leave=False)]
    keys = collections.Counter(key for shard in opened for key in shard.keys)
    broken = [line for shard in opened for line in shard.broken]
    if twice := [key for key, count in keys.items() if count > 1]:
        broken.append(f"{len(twice)} keys come more than once: {', '.join(twice[:NAMED])}")
    broken += _against_manifest(address, opened)
    places = [(shard, i) for shard in opened for i in range(len(shard))]
    picked = (
        places
        if len(places) <= (limit or len(places))
        else [places[i] for i in np.unique(np.linspace(0, len(places) - 1, limit).astype(int))]
    )
    found, captions = Found(), []
    for shard, i in tqdm(picked, "read", unit="sample", delay=2, leave=False):
        try:
            sample = shard.read(i)
        except (ValueError, OSError) as error:
            found.bad.append(str(error))
            continue
        found.add(sample, shard.name(i))
        if len(captions) < SHOWN:
            captions.append(f"  {sample.key}: {sample.prompt[:200]!r}")
    size = sum(shard.size for shard in opened)
    lines = [
        f"{address}: {len(places)} samples in {len(opened)} shards, {size / 1e6:.1f} MB",
        f"numbers of {len(picked)} samples:", *_numbers(found), "captions:", *captions,
    ]  # fmt: skip
    return lines, broken + found.bad


def _against_manifest(address: str, shards: Sequence[Shard]) -> list[str]:
    path = Path(address) / MANIFEST
    if "://" in address or not path.is_file():
        return []
    wanted = {record["name"]: record for record in json.loads(path.read_text())["shards"]}
    there = {Path(shard.address).name: shard for shard in shards}
    out = [f"{name} is in {MANIFEST} and not there" for name in sorted(wanted.keys() - there.keys())]
    out += [f"{name} is there and not in {MANIFEST}" for name in sorted(there.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & there.keys()):
        record, shard = wanted[name], there[name]
        if (record["bytes"], record["samples"]) != (shard.size, len(shard)):
            out.append(
                f"{name} has {shard.size} bytes and {len(shard)} samples; {MANIFEST} says {record['bytes']} and "
                f"{record['samples']}"
            )
    return out


def _numbers(found: Found) -> Iterator[str]:
    if len(found.shapes) > 1:
        found.bad.append(f"samples are of {len(found.shapes)} kinds: " + "; ".join(found.shapes))
    yield from (f"  {count} of {shapes}" for shapes, count in found.shapes.most_common())
    if not found.sums:
        return
    low, middle, high = np.percentile(found.lengths, (0, 50, 100)).astype(int)
    yield f"  text: {low} to {high} tokens, half of them at most {middle}"
    channels = {sums.shape for sums in found.sums}
    if len(channels) == 1:
        count, total, squares = np.sum(found.sums, axis=0)
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        yield "  latents by channel, mean: " + " ".join(f"{value:.2f}" for value in mean)
        yield "  standard deviation:       " + " ".join(f"{value:.2f}" for value in deviation)
    names = [f"below {EDGES[0]:g}", *(f"{low:g} to {low + EDGES[1] - EDGES[0]:g}" for low in EDGES[:-1]), "above"]
    total = found.counts.sum()
    for name, count in zip(names, found.counts, strict=True):
        yield f"  {name:>12} {count / total:7.2%} {'#' * round(WIDTH * count / found.counts.max())}"


def find_sample(address: str, index: int) -> tuple[Sample, str]:
    """Sample `index` of a set, counted over its shards, and where it lies. Raises ArgumentError where there is none."""
    count = 0
    for one in find_shards(address):
        shard = open_shard(one)
        if index < count + len(shard):
            return shard.read(index - count), shard.name(index - count)
        count += len(shard)
    raise ArgumentError(f"{{index}} must be 0 to {count - 1}", index=index)


def describe_sample(sample: Sample, place: str) -> list[str]:
    found = Found()
    found.add(sample, place)
    return [place, f"  {sample.prompt!r}", *_numbers(found), *(f"broken: {line}" for line in found.bad)]


def decode_sample(sample: Sample, vae_path: str | None, vae_dtype: str, out: Path) -> Path:
    """A video or a strip of a sample's frames: by the toy codec where no autoencoder is named."""
    from rcm_jax.media.pictures import enlarge, strip, write_png
    from rcm_jax.media.video import write_video
    from rcm_jax.worlds.painted import checked
    from rcm_jax.worlds.toy.world import ToyWorld
    from rcm_jax.worlds.wan.files import open_encoders
    from rcm_jax.worlds.wan.world import WanWorld

    if vae_path is None:
        world = ToyWorld()
        channels, option = world.codec.channels, "the built-in world's; name another with {vae_path}"
    else:
        files = open_encoders(vae_path, reads_text=False)
        world, channels, option = WanWorld(files, vae_dtype=vae_dtype), files.vae.config.z_dim, "{vae_path}"
    latents = sample.latents[0] if sample.latents.ndim == 5 else sample.latents
    if latents.shape[-1] != channels:
        raise ArgumentError(
            f"{sample.key} has {latents.shape[-1]} channels, and the decoder ({option}) reads {channels}",
            vae_path=vae_path,
        )  # fmt: skip
    (parts,) = world.paint(latents.astype(np.float32)[None])
    video = np.concatenate([checked(part, f"frames of {sample.key}") for part in parts])
    frames = enlarge(video, world.scale)
    if out.suffix == ".png":
        return write_png(out, strip(frames, frames=min(5, len(frames))))
    return write_video(out, frames, world.fps, {"title": sample.prompt})
