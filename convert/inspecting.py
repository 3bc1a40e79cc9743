"""What a file is, and in what two differ: for people, in lines."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from rcm_jax.convert.checkpoint import Checkpoint, NetworkOptions, info_of, open_checkpoint
from rcm_jax.convert.files import open_weights
from rcm_jax.convert.lora import Lora, read_lora
from rcm_jax.convert.tensors import Tensor
from rcm_jax.convert.variants import UnsupportedVariantError
from rcm_jax.hub import Place, find
from rcm_jax.progress import byte_bar
from rcm_jax.tensor_stream import SUMS


def lines_about(
    path: str, options: NetworkOptions, *, entry: str | None = None, tensors: bool = False
) -> Iterator[str]:  # fmt: skip
    """What is in a file or folder: a network and how it would be sampled, or a LoRA; numbers of each dtype; with
    `tensors` all of them. Raises ValueError for what is neither."""
    place = find(path)
    try:
        found = open_checkpoint(place, entry=entry, num_heads=options.num_heads)
    except UnsupportedVariantError as known:
        yield str(known)
        return
    except ValueError as no_network:
        try:
            lora = read_lora(place)
        except ValueError:
            raise no_network from None
        yield from _about_lora(lora)
        parts = {f"{module}: {part}": t for module, p in lora.modules.items() for part, t in p.items()}
    else:
        yield str(found)
        yield from _about_network(found, options)
        parts = found.wan()
    for dtype, (count, size) in sorted(_by_dtype(parts).items()):
        yield f"{dtype}: {count} tensors, {size:,} bytes"
    if SUMS in open_weights(place).metadata:
        yield "with a checksum of every tensor: `rcm-convert verify` compares the numbers with them"
    if tensors:
        yield from (f"{name} {t.shape} {t.dtype}" for name, t in parts.items())


def _about_network(found: Checkpoint, options: NetworkOptions) -> Iterator[str]:
    info = info_of(found, options)
    if found.network.name != "dit":
        return
    rounded = f", time rounded to {info.model.round_time_to}" if info.model.round_time_to else ""
    if info.kind == "student":
        yield f"sampled as a student: 1 to 4 steps from sigma {info.sigma_max:g}, no guidance{rounded}"
    else:
        yield f"sampled as a teacher: guidance {info.guidance:g}, many steps{rounded}"
    if info.model.image_first:
        yield "from text, or with an image as its first latent frame"
    elif info.model.takes_image:
        yield "from an image, whose condition stands behind the noise"
    chunks = info.causal.get("pattern") if info.causal else None
    yield f"causal, in chunks {chunks}" if chunks else "all frames at once; causal with --first_chunk_t and --chunk_t"


def _about_lora(lora: Lora) -> Iterator[str]:
    yield str(lora)
    layers = Counter(".".join(p for p in module.split(".") if not p.isdigit()) for module in lora.modules)
    yield "of " + ", ".join(f"{name} ({count})" for name, count in sorted(layers.items()))


def _by_dtype(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for t in tensors.values():
        count, size = counts.get(str(t.dtype), (0, 0))
        counts[str(t.dtype)] = count + 1, size + t.nbytes
    return counts


class Difference(NamedTuple):
    """Of one tensor: the largest difference of two numbers, and the norm of all over that of the first's."""

    name: str
    largest: float
    relative: float


def differing(a: Checkpoint, b: Checkpoint) -> tuple[list[Difference], list[str]]:
    """The tensors whose numbers differ, most (relatively) first, and lines about those of one network alone or of
    another shape. By Wan2.1's names, block by block. Raises ValueError for networks of two kinds."""
    if a.network is not b.network:
        raise ValueError(f"{a.path} is a {a.network.title}, {b.path} a {b.network.title}")
    ours, theirs = a.wan(), b.wan()
    apart = [f"{name}: only in {a.path if name in ours else b.path}" for name in sorted(ours.keys() ^ theirs.keys())]
    out, both = [], sorted(ours.keys() & theirs.keys())
    with byte_bar("compare", sum(ours[name].nbytes for name in both)) as advance:
        for name in both:
            one, other = ours[name], theirs[name]
            if one.shape != other.shape:
                apart.append(f"{name}: {one.shape} and {other.shape}")
            elif (found := _difference(name, one, other)).relative > 0:
                out.append(found)
            advance(one.nbytes)
    return sorted(out, key=lambda d: -d.relative), apart


def _difference(name: str, one: Tensor, other: Tensor) -> Difference:
    largest = error = norm = 0.0
    for x, y in zip(one.blocks(), other.blocks(), strict=True):
        x, y = (z.astype(np.float64) for z in (x, y))
        change = x - y
        if not np.isfinite(change).all():
            return Difference(name, float("inf"), float("inf"))
        largest = max(largest, float(np.abs(change).max(initial=0)))
        error, norm = error + float((change**2).sum()), norm + float((x**2).sum())
    if not error:
        return Difference(name, 0.0, 0.0)
    return Difference(name, largest, (error / norm) ** 0.5 if norm else float("inf"))


def lines_of_difference(a: Place | str, b: Place | str, options: NetworkOptions, most: int) -> Iterator[str]:
    """The table of `diff`; its first line says whether there is any."""
    one, other = (open_checkpoint(find(path), num_heads=options.num_heads) for path in (a, b))
    yield str(one)
    yield str(other)
    found, apart = differing(one, other)
    yield from apart
    if not found and not apart:
        yield "the same numbers"
        return
    yield f"{len(found)} tensors differ" + (f"; the {most} that differ most" if len(found) > most else "")
    if found:
        width = max(len(d.name) for d in found[:most])
        yield f"{'':{width}}  relative   largest"
        yield from (f"{d.name:{width}}  {d.relative:8.2e}  {d.largest:8.2e}" for d in found[:most])
