"""A run from shards: the numbers of one from the source they were made of, and only on the set it began with."""

import dataclasses

import jax
import numpy as np
import pytest

from rcm_jax.data.sample import Sample
from rcm_jax.data.shard_files import write_shard
from rcm_jax.data.source import ToySource, make_source
from rcm_jax.training.info import world_name
from rcm_jax.training.loop import train
from rcm_jax.training.metrics import read_metrics
from rcm_jax.training.state import Weights
from rcm_jax.wan.networks import init_params
from tests.tiny import MODEL, tiny_run

DEVICE = jax.devices()[:1]


def toy_set(folder, config, steps):
    """The videos of so many steps of the built-in world, in their order, as they are."""
    source, size = ToySource(config.data, config.seed), config.data.batch_size
    for step in range(steps):
        batch = source.batch(step)
        samples = [Sample(f"{step * size + i:09d}", batch.latents[i], batch.text[i]) for i in range(size)]
        write_shard(folder / f"shard-{step:06d}.tar", samples)
    return folder


def from_shards(config, folder, **options):
    data = dataclasses.replace(config.data, name="shards", path=str(folder), null_text="toy", **options)
    return dataclasses.replace(config, data=data)


def run(config, workdir=None, source=None):
    weights = Weights(teacher=init_params(MODEL, jax.random.key(7)))
    source = source or make_source(config.data, config.seed, config.model)
    return train(config, source, workdir, weights=weights, devices=DEVICE, progress="")


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "diffusion"}, "steps": 3},
        pytest.param({"steps": 4, "microbatches": 2}, marks=pytest.mark.slow),
    ],
)
def test_from_shards_as_from_their_source_bit_for_bit(tmp_path, changes):
    config = tiny_run(**changes)
    shards = from_shards(config, toy_set(tmp_path / "set", config, config.steps), shuffle=False)
    assert world_name(shards) == "toy"
    a, b = run(config, tmp_path / "toy"), run(shards, tmp_path / "shards")
    jax.tree.map(np.testing.assert_array_equal, a, b)
    records = [read_metrics(tmp_path / name) for name in ("toy", "shards")]
    assert records[0] == records[1]
    assert len(records[0]) == config.steps


@pytest.mark.long
def test_a_run_goes_on_with_its_own_set_alone(tmp_path):
    config = tiny_run(method={"name": "diffusion"}, steps=1, checkpoint_every=1)
    folder = toy_set(tmp_path / "set", config, 2)
    shards = from_shards(config, folder)
    run(shards, tmp_path / "run")
    moved = folder.rename(tmp_path / "moved")  # a set may move
    there = dataclasses.replace(from_shards(config, moved), steps=2)
    (moved / "shard-000001.tar").rename(tmp_path / "kept")
    why = r"step 1 of .*run was trained on other data \(2 shards then, 1 now\)|16 samples then, 8 now"
    with pytest.raises(ValueError, match=why):
        run(there, tmp_path / "run")
    (tmp_path / "kept").rename(moved / "shard-000001.tar")
    assert run(there, tmp_path / "run").step == 2


@pytest.mark.slow
def test_sets_of_bfloat16_train(tmp_path):
    """The step makes float32 of what was sent in half the bytes."""
    config = tiny_run(method={"name": "diffusion"}, steps=1)
    folder = tmp_path / "set"
    batch = ToySource(config.data, 0).batch(0)
    half = np.dtype("bfloat16")
    samples = [Sample(str(i), batch.latents[i].astype(half), batch.text[i].astype(half)) for i in range(8)]
    write_shard(folder / "shard-0.tar", samples)
    shards = from_shards(config, folder, shuffle=False)
    assert make_source(shards.data, 0, MODEL).batch(0).latents.dtype == half

    class Rounded(ToySource):
        def batch(self, step, rows=None):
            return jax.tree.map(lambda x: x.astype(half).astype(np.float32), super().batch(step, rows))

    rounded = run(config, source=Rounded(config.data, config.seed))
    jax.tree.map(np.testing.assert_array_equal, run(shards), rounded)
