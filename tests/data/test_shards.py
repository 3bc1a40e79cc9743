"""What a run reads of a set: every sample, what is bad left out, what does not go with the recipe refused."""

import dataclasses
import pickle
import tarfile

import jax
import ml_dtypes
import numpy as np
import pytest

from rcm_jax.data.config import DataConfig
from rcm_jax.data.sample import Sample
from rcm_jax.data.shard_files import write_shard
from rcm_jax.data.source import batches, make_source
from rcm_jax.wan.config import DiTConfig
from tests.convert.test_torch_io import Evil, zip_with
from tests.data.published import triple, write_tar

BF16 = ml_dtypes.bfloat16
MODEL = DiTConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=1, in_channels=2, out_channels=2, freq_dim=16, text_dim=8, text_len=6,
)  # fmt: skip
I2V = dataclasses.replace(MODEL, in_channels=5, image_dim=4)
GRID = (3, 4, 5)


def sample(i: int, *, grid=GRID, width=8, dtype=BF16, **more) -> Sample:
    """Its first number says which it is."""
    rng = np.random.default_rng(i)
    latents, text = rng.normal(size=(*grid, 2)), rng.normal(size=(4, width))
    latents[0, 0, 0, 0] = i
    return Sample(f"{i:09d}", latents.astype(dtype), text.astype(dtype), **more)


def with_image(i: int, **more) -> Sample:
    rng = np.random.default_rng(i)
    return sample(
        i, condition=rng.normal(size=(*GRID, 3)).astype(BF16), image=rng.normal(size=(7, 4)).astype(BF16), **more
    )


def write_set(folder, samples, per_shard=4):
    folder.mkdir(exist_ok=True)
    for at in range(0, len(samples), per_shard):
        write_shard(folder / f"shard-{at // per_shard:06d}.tar", samples[at : at + per_shard])
    return folder


@pytest.fixture
def null_text(tmp_path):
    np.save(tmp_path / "null.npy", np.ones((2, 8), np.float32))
    return str(tmp_path / "null.npy")


@pytest.fixture
def open_set(null_text):
    def opened(folder, model=MODEL, seed=0, **options):
        values = {"batch_size": 4, "latent_shape": GRID, "null_text": null_text, "threads": 3, "window": 2} | options
        return make_source(DataConfig(name="shards", path=str(folder), **values), seed, model)

    return opened


def seen(source, steps: int) -> list[int]:
    return [int(x) for step in range(steps) for x in source.batch(step).latents[:, 0, 0, 0, 0]]


def test_batches_are_the_samples(tmp_path, open_set):
    source = open_set(write_set(tmp_path / "set", [sample(i) for i in range(10)]), shuffle=False)
    batch = source.batch(1)
    for row, i in enumerate(range(4, 8)):
        np.testing.assert_array_equal(batch.latents[row], sample(i).latents, strict=True)
        np.testing.assert_array_equal(batch.text[row, :4], sample(i).text, strict=True)
        assert not batch.text[row, 4:].any()
    assert batch.text.shape == (4, 6, 8)
    assert batch.condition is batch.image is None
    assert source.keys(2) == [f"{tmp_path}/set/shard-{s:06d}.tar: {i:09d}" for s, i in ((2, 8), (2, 9), (0, 0), (0, 1))]
    np.testing.assert_array_equal(source.null_text, np.concatenate([np.ones((2, 8)), np.zeros((4, 8))]))
    assert source.about["samples"] == 10
    assert source.about["shards"] == 3


def test_read_ahead_by_threads_is_the_same_and_split_by_rows(tmp_path, open_set):
    """Also with more hosts than shards."""
    source = open_set(write_set(tmp_path / "set", [sample(i) for i in range(10)], per_shard=10), batch_size=6)
    whole = [source.batch(step) for step in range(3, 8)]
    parts = [list(batches(source, 3, 8, rows)) for rows in (range(0, 1), range(1, 2), range(2, 6))]
    for step, batch in enumerate(whole):
        together = jax.tree.map(lambda *x: np.concatenate(x), *(part[step] for part in parts))
        jax.tree.map(np.testing.assert_array_equal, batch, together)
    assert sorted(seen(source, 5)) == sorted([*range(10)] * 3)


def test_longer_videos_are_cut_and_a_trajectory_is_its_clean_video(tmp_path, open_set):
    long = sample(0, grid=(5, 4, 5))
    path = Sample("1", np.stack([sample(i).latents for i in (1, 8, 9)]), sample(1).text)
    batch = open_set(write_set(tmp_path / "set", [long, path]), shuffle=False, batch_size=2).batch(0)
    np.testing.assert_array_equal(batch.latents[0], long.latents[:3], strict=True)
    np.testing.assert_array_equal(batch.latents[1], sample(1).latents, strict=True)


def test_conditions_and_image_tokens(tmp_path, open_set):
    samples = [with_image(i) for i in range(4)]
    folder = write_set(tmp_path / "set", samples)
    batch = open_set(folder, I2V, shuffle=False).batch(0)
    np.testing.assert_array_equal(batch.condition[2], samples[2].condition, strict=True)
    np.testing.assert_array_equal(batch.image[3], samples[3].image, strict=True)
    odd = dataclasses.replace(samples[1], image=samples[1].image[:5])
    mixed = open_set(write_set(tmp_path / "mixed", [samples[0], odd, *samples[2:]]), I2V, shuffle=False)
    assert seen(mixed, 1) == [0, 2, 2, 3]
    with pytest.raises(ValueError, match=r"000000000 has a condition, and the recipe's network takes no image"):
        open_set(folder)
    with pytest.raises(ValueError, match=r"000000000 has no condition, and the recipe's network takes an image"):
        open_set(write_set(tmp_path / "text", [sample(i) for i in range(4)]), I2V)


def test_a_set_that_does_not_go_with_the_recipe(tmp_path, open_set):
    def refused(samples, why, kind=ValueError, **options):
        folder = write_set(tmp_path / str(len(list(tmp_path.iterdir()))), samples)
        with pytest.raises(kind, match=why) as error:
            open_set(folder, **options)
        assert "\n" not in str(error.value)

    sizes = r"shard-000000.tar: 000000000: latents are \[3, 4, 6, 2\] .*, and the recipe's are \[3, 4, 5, 2\]"
    refused([sample(i, grid=(3, 4, 6)) for i in range(5)], sizes)
    refused(
        [sample(i) for i in range(2)],
        r"latents are \[3, 4, 5, 2\] .*recipe's are \[4, 4, 5, 2\]",
        latent_shape=(4, 4, 5),
    )
    refused(
        [sample(i, width=9) for i in range(2)],
        r"000000000: text is \[4, 9\], and the recipe's networks read a width of 8",
    )
    refused([Sample("0", sample(0).latents, np.ones((7, 8), BF16))], r"0: text has 7 tokens, and .* read 6")
    refused([sample(0)], r"data.latent_shape=\(0, 0, 0\)", latent_shape=(0, 0, 0))
    refused([sample(0)], r"data.null_text is empty", null_text="")
    refused([], r"data.path=.* has 0 shards|has no shard\*.tar", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match=r"data.path=.*absent"):
        open_set(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"data.path is empty"):
        open_set("")
    write_shard(tmp_path / "none" / "shard-0.tar", [])
    with pytest.raises(ValueError, match=r"none has 1 shards and no sample that is whole"):
        open_set(tmp_path / "none")


def published(s: Sample) -> list[tuple[str, bytes]]:
    return [*triple(s.key, np.moveaxis(s.latents, -1, -4), s.text, s.prompt).items()]


def spoilt(tmp_path, kind: str) -> list[tuple[str, bytes]]:
    """The members of sample 2, bad."""
    good, nan = dict(published(sample(2))), sample(2)
    latents = f"{nan.key}.latent.pt"
    if kind == "NaN":
        nan.latents[1, 1, 1, 1] = np.nan
        return published(nan)
    if kind == "shape":
        return published(sample(2, grid=(3, 4, 9)))
    if kind == "pickle":
        evil = zip_with(tmp_path / "evil.pt", pickle.dumps(Evil(tmp_path / "canary"), protocol=2))
        return [*(good | {latents: evil.read_bytes()}).items()]
    return [*(good | {latents: good[latents][:-300]}).items()]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("NaN", "latents: 1 of 120 numbers are NaN"),
        ("shape", r"latents are \[3, 4, 9, 2\]"),
        ("pickle", "is refused: its pickle asks for posix.system"),
        ("half a file", "is not a whole PyTorch file"),
    ],
)
def test_a_bad_sample_is_named_once_and_the_next_takes_its_place(tmp_path, open_set, capsys, kind, why):
    import re

    folder = tmp_path / "set"
    folder.mkdir()
    for shard in range(2):
        ids = range(5 * shard, 5 * shard + 5)
        members = [m for i in ids for m in (spoilt(tmp_path, kind) if i == 2 else published(sample(i)))]
        write_tar(folder / f"shard-{shard:06d}.tar", members)
    source = open_set(folder, shuffle=False, batch_size=5)
    first = seen(source, 4)
    assert first == [0, 1, 3, 3, 4, 5, 6, 7, 8, 9] * 2
    assert source.keys(0)[2].endswith("000000003")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert re.search(rf"left out \(1 of data.max_bad=16\): .*shard-000000.tar: 000000002.*{why}", told[0])
    assert not (tmp_path / "canary").exists()
    again = open_set(folder, shuffle=False, batch_size=5)  # a resumption, which does not know yet
    assert [int(x) for b in batches(again, 2, 4, range(5)) for x in b.latents[:, 0, 0, 0, 0]] == first[10:]
    with pytest.raises(ValueError, match=rf"1 samples cannot be used, and data.max_bad=0: .*000000002.*{why}"):
        list(batches(open_set(folder, shuffle=False, max_bad=0), 0, 2, range(4)))


def test_the_order_of_the_others_stays_when_samples_are_bad(tmp_path, open_set):
    samples = [sample(i) for i in range(12)]
    whole = seen(open_set(write_set(tmp_path / "set", samples)), 6)
    folder = tmp_path / "bad"
    folder.mkdir()
    for shard in range(3):
        members = []
        for i in range(4 * shard, 4 * shard + 4):
            members += published(sample(i, grid=(1, 1, 1)) if i in (5, 6) else sample(i))
        write_tar(folder / f"shard-{shard:06d}.tar", members)
    order = whole[:12]
    expected = [next(j for j in (order[p:] + order[:p]) if j not in (5, 6)) for p in range(12)]
    assert seen(open_set(folder), 3) == expected
    with pytest.raises(
        ValueError, match=r"2 samples cannot be used, and data.max_bad=1: .*: 00000000[56].*; .*00000000[56]"
    ):
        seen(open_set(folder, max_bad=1), 3)


def test_damaged_shards_are_read_as_far_as_they_are_whole(tmp_path, open_set, capsys):
    """A truncated tar, a missing member, a key that comes twice."""
    folder = tmp_path / "set"
    folder.mkdir()
    cut = write_tar(folder / "shard-000000.tar", [m for i in range(3) for m in published(sample(i))])
    with tarfile.open(cut) as tar:
        end = tar.getmember("000000002.embed.pt").offset_data + 10
    cut.write_bytes(cut.read_bytes()[:end])
    members = [*published(sample(3))[1:], *published(sample(4)), *published(sample(5))[:2], *published(sample(5))]
    write_tar(folder / "shard-000001.tar", members)
    source = open_set(folder, batch_size=4)
    assert sorted(seen(source, 1)) == [0, 1, 4, 5]
    told = capsys.readouterr().err
    for line in ("ends within 000000002.embed.pt", "000000002 lacks .embed.pt", "000000003 lacks .latent.pt"):
        assert line in told
    with pytest.raises(ValueError, match=r"3 samples cannot be used, and data.max_bad=2: .*ends within 000000002"):
        open_set(folder, max_bad=2)


def test_another_set_has_another_fingerprint(tmp_path, open_set):
    folder = write_set(tmp_path / "set", [sample(i) for i in range(8)])
    about = open_set(folder).about
    moved = folder.rename(tmp_path / "elsewhere")
    assert open_set(moved).about == about
    (moved / "shard-000001.tar").rename(moved / "shard-000002.tar")
    assert open_set(moved).about["fingerprint"] != about["fingerprint"]


def test_text_of_the_built_in_world(open_set, tmp_path):
    toy = dataclasses.replace(MODEL, text_dim=64, text_len=8)
    folder = write_set(tmp_path / "set", [sample(0, width=64)])
    np.testing.assert_array_equal(open_set(folder, toy, null_text="toy").null_text, np.zeros((8, 64), np.float32))
    with pytest.raises(ValueError, match=r"data.null_text='toy' is \(8, 64\)"):
        open_set(write_set(tmp_path / "narrow", [sample(0)]), null_text="toy")
