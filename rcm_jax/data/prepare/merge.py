"""Shards of any sets regrouped into files of one size, in the order of their keys; nothing is shuffled."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from rcm_jax.data.prepare.options import SetOptions
from rcm_jax.data.prepare.sets import LeftOut, Plan, ShardSet, digest_of, key_of
from rcm_jax.data.sample import Sample
from rcm_jax.data.shard_files import Shard, find_shards, open_shard
from rcm_jax.errors import ArgumentError
from rcm_jax.finite import check_finite

NAMED = 5  # keys that an error names


class Place(NamedTuple):
    key: str
    shard: Shard
    number: int


def make_merged(sources: Sequence[str], options: SetOptions, *, renumber: bool = False, skip_bad: bool = False) -> str:
    """renumber: new keys, in the order of the sources. skip_bad: without what is damaged. Raises ArgumentError for sets
    that share keys or have damaged samples, unless told otherwise."""
    addresses = [address for source in sources for address in find_shards(source)]
    if str(options.out.resolve()) in map(_folder, addresses):
        raise ArgumentError("{out} is among the sets that are read: give another folder", out=options.out)
    shards = [open_shard(address) for address in tqdm(addresses, "open", unit="shard", delay=2, leave=False)]
    broken = [line for shard in shards for line in shard.broken]
    if broken and not skip_bad:
        raise ArgumentError(f"{'; '.join(broken[:NAMED])}: {{skip_bad}} goes on without", skip_bad=None)
    places = _places(shards, renumber)
    keys = [place.key for place in places]
    settings = {"sources": [str(source) for source in sources], "renumber": renumber}
    merged = ShardSet(options, Plan("merge", settings, len(places), digest_of(keys)), keys=keys)

    def samples(numbers: range) -> Iterator[Sample | LeftOut]:
        for place in places[numbers.start : numbers.stop]:
            try:
                yield _read(place)
            except (ValueError, FloatingPointError) as error:
                if not skip_bad:
                    raise
                yield LeftOut(place.key, str(error))

    told = merged.make(samples, "merge")
    merged.verify()
    return told


def _places(shards: Sequence[Shard], renumber: bool) -> list[Place]:
    places = [Place(key, shard, i) for shard in shards for i, key in enumerate(shard.keys)]
    if renumber:
        return [Place(key_of(number), *place[1:]) for number, place in enumerate(places)]
    _check_apart(places)
    return sorted(places, key=lambda place: place.key)


def _read(place: Place) -> Sample:
    """Raises ValueError or FloatingPointError for what is damaged."""
    sample = place.shard.read(place.number)
    for name, tensor in sample.tensors.items():
        check_finite(tensor, f"{place.shard.name(place.number)}: {name}")
    return dataclasses.replace(sample, key=place.key)


def _folder(address: str) -> str:
    return "" if "://" in address else str(Path(address).resolve().parent)


def _check_apart(places: Sequence[Place]) -> None:
    twice = [key for key, count in collections.Counter(place.key for place in places).items() if count > 1]
    if twice:
        names = ", ".join(twice[:NAMED]) + (" …" if len(twice) > NAMED else "")
        raise ArgumentError(
            f"{len(twice)} keys are in several of the sets ({names}): {{renumber}} gives new ones, in the order in "
            "which the sets are given", renumber=None,
        )  # fmt: skip
