"""Sets without videos: the built-in world's, prompts, a teacher's latents, merged ones; and what inspect says."""

import json

import imageio.v3 as iio
import ml_dtypes
import numpy as np
import pytest

import rcm_jax
from rcm_jax.data.config import DataConfig
from rcm_jax.data.null_text import open_null_text
from rcm_jax.data.prepare import __main__ as commands
from rcm_jax.data.prepare import teacher
from rcm_jax.data.prepare.prompts import open_prompts
from rcm_jax.data.prepare.text import cut_to_length, features
from rcm_jax.data.sample import Sample
from rcm_jax.data.shard_files import find_shards, open_shard, write_shard
from rcm_jax.data.source import ToySource
from rcm_jax.worlds.toy import encode_text
from rcm_jax.worlds.wan.files import open_text
from rcm_jax.worlds.wan.negative import PROMPT
from rcm_jax.worlds.wan.text import encode_prompts
from tests.data.test_null_text import SHARDS
from tests.test_entry_points import fails
from tests.wan.tiny import DIT, write_wan

PROMPTS = "a red circle moving left\n\n  a blue square moving up \ngreen diamond\n"
WORDS = ["a red circle moving left", "a blue square moving up", "green diamond"]


def samples(out):
    return [shard.read(i) for shard in map(open_shard, find_shards(out)) for i in range(len(shard))]


def run(capsys, *argv):
    commands.main([str(word) for word in argv])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "set"
    commands.main(["world", "--count", "11", "--seed", "3", "--samples_per_shard", "4", "--out", str(out)])
    return out


@pytest.mark.parametrize("optimised", [False, pytest.param(True, marks=pytest.mark.optimised)])
def test_the_worlds_shards_are_its_source(world, optimised, tmp_path):
    """Whatever batches the source makes, and compiled as for users too."""
    if optimised:
        commands.main(["world", "--count", "11", "--seed", "3", "--out", str(tmp_path / "set")])
        world = tmp_path / "set"
    found = samples(world)
    for size in (1, 4, 11):
        source = ToySource(DataConfig(batch_size=size), seed=3)
        for step in range(11 // size):
            batch = source.batch(step)
            for one, latents, text in zip(found[step * size :], batch.latents, batch.text, strict=False):
                np.testing.assert_array_equal(one.latents, latents)
                np.testing.assert_array_equal(one.text, text)
    assert {one.latents.dtype for one in found} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(encode_text([one.prompt for one in found]), [one.text for one in found])


@pytest.mark.long
def test_a_teachers_latents_are_those_that_sampling_decodes(tmp_path, capsys):
    (tmp_path / "p.txt").write_text(PROMPTS)
    flags = ("teacher", "--prompts", tmp_path / "p.txt", "--teacher", "toy", "--num_steps", 2, "--seed", 5)
    flags += ("--samples_per_shard", 2)
    for process in (0, 1):
        told = run(capsys, *flags, "--process", process, "--num_processes", 2, "--out", tmp_path / "set")
    assert told.startswith(f"{tmp_path / 'set'}: 3 samples in 2 files")
    found, pipe = samples(tmp_path / "set"), rcm_jax.load("toy")
    assert [(one.key, one.prompt) for one in found] == [(f"{i:09d}", words) for i, words in enumerate(WORDS)]
    for group in ([0, 1], [2]):
        words = [WORDS[i] for i in group]
        arrays = pipe.arrays(words, indices=group, seed=5, num_steps=2)
        stored = np.stack([found[i].latents for i in group])
        np.testing.assert_array_equal(np.concatenate([*map(list, pipe.world.decode(stored))]), arrays)
        np.testing.assert_array_equal(pipe.latents(words, indices=group, seed=5, num_steps=2), stored)
    np.testing.assert_array_equal(found[2].text, encode_text(["green diamond"])[0, :2])
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["settings"]["num_steps"] == 2
    assert manifest["settings"]["seed"] == 5
    flags = ("--out", tmp_path / "set", "--num_steps", 3)
    fails(commands.main, list(map(str, ("teacher", "--prompts", tmp_path / "p.txt", "--teacher", "toy", *flags))),
          "num_steps was 2 and is 3", "seed was 5 and is 0")  # fmt: skip


def test_the_published_settings_are_a_wan_teachers():
    assert teacher.PUBLISHED["negative_prompt"] == PROMPT
    rest = {name: value for name, value in teacher.PUBLISHED.items() if name != "negative_prompt"}
    assert rest == {"sampler": "euler", "num_steps": 100, "guidance_scale": 5.0, "shift": 3.0, "num_frames": 81}


def test_teachers_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text(PROMPTS)
    flags = ["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "set")]
    fails(commands.main, ["teacher", "--teacher", "toy_causal", *flags], "--teacher is a causal network")
    fails(commands.main, ["teacher", "--teacher", "toy", "--resolution", "480p", *flags], "--resolution does not apply")
    flags[1] = str(tmp_path / "none.txt")
    fails(commands.main, ["teacher", "--teacher", "toy", *flags], "none.txt is not there: name a file")
    (tmp_path / "empty").mkdir()
    flags[1] = str(tmp_path / "empty")
    fails(commands.main, ["teacher", "--teacher", "toy", *flags], "empty is a folder in which there are no prompts")
    assert not (tmp_path / "set").exists()


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def texts(wan, tmp_path_factory):
    out = tmp_path_factory.mktemp("texts")
    (out / "p.txt").write_text("a red fox\na cat on a boat\nit rains\n")
    commands.main(["prompts", str(out / "p.txt"), "--text_encoder", str(wan), "--samples_per_shard", "2",
                   "--out", str(out / "set")])  # fmt: skip
    return out / "set"


def test_prompts_and_the_negative_one(texts, wan):
    found = open_prompts(texts)
    assert found.words == ["a red fox", "a cat on a boat", "it rains"]
    encoder, words = open_text(str(wan))
    for i, row in enumerate(encode_prompts(encoder, *words(found.words), dtype="bfloat16")):
        np.testing.assert_array_equal(found.features(i), cut_to_length(row))
    null = open_null_text(DataConfig(name="shards", null_text=str(texts / "negative.safetensors")), DIT)
    np.testing.assert_array_equal(null, open_null_text(SHARDS, DIT, text_encoder=str(wan)))
    (second,) = texts.glob("text-000001.*")
    assert json.loads((texts / "manifest.json").read_text())["shards"][1]["samples"] == 1
    kept = second.read_bytes()
    second.write_bytes(kept[:100])
    with pytest.raises(ValueError, match=r"text-000001.safetensors is no file of prompts"):
        open_prompts(texts)
    second.unlink()
    (texts / "manifest.json").rename(texts / "aside")
    with pytest.raises(ValueError, match=r"prompts=.* has no manifest.json: not all of it is made yet"):
        open_prompts(texts)
    (texts / "aside").rename(texts / "manifest.json")
    second.write_bytes(kept)


def test_features_come_in_blocks_and_in_order():
    asked = []

    def encode(prompts):
        asked.append(list(prompts))
        return np.stack([np.pad(np.full((int(p), 2), float(p)), ((0, 5 - int(p)), (0, 0))) for p in prompts])

    rows = features(encode, ["1", "3", "2"], block=2)
    assert next(rows).tolist() == [[1, 1]]
    assert asked == [["1", "3"]]
    assert [row.shape for row in rows] == [(3, 2), (2, 2)]
    assert cut_to_length(np.zeros((4, 2))).shape == (1, 2)


def test_a_wan_teacher_samples_for_the_folder_of_prompts(texts, wan, tmp_path):
    """Text that was encoded before gives what words give."""
    flags = ["--teacher", str(wan), "--num_steps", "1", "--num_frames", "5", "--size", "32x32"]
    flags += ["--vae_path", str(wan), "--num_heads", "2"]
    commands.main(["teacher", "--prompts", str(texts), *flags, "--out", str(tmp_path / "set")])
    found = samples(tmp_path / "set")
    pipe = rcm_jax.load(str(wan), num_heads=2)
    options = teacher.PUBLISHED | {"num_steps": 1, "num_frames": 5, "size": "32x32"}
    latents = pipe.latents([found[1].prompt], indices=[1], **options)
    np.testing.assert_array_equal(found[1].latents, latents[0].astype(ml_dtypes.bfloat16))
    assert found[1].latents.shape == (2, 4, 4, 16)
    assert (tmp_path / "set" / "negative.safetensors").is_file()


def test_merging_keeps_all_and_orders_by_key(world, tmp_path, capsys):
    told = run(capsys, "merge", world, "--out", tmp_path / "m", "--samples_per_shard", 8)
    assert told.startswith(f"{tmp_path / 'm'}: 11 samples in 2 files")
    for one, other in zip(samples(tmp_path / "m"), samples(world), strict=True):
        assert (one.key, one.prompt) == (other.key, other.prompt)
        np.testing.assert_array_equal(one.latents, other.latents)
        np.testing.assert_array_equal(one.text, other.text)
    again = ["merge", str(world), str(tmp_path / "m")]
    fails(commands.main, [*again, "--out", str(tmp_path / "n")], "11 keys are in several of the sets (000000000, ",
          "--renumber gives new ones")  # fmt: skip
    run(capsys, *again, "--out", tmp_path / "n", "--renumber")
    assert [one.key for one in samples(tmp_path / "n")] == [f"{i:09d}" for i in range(22)]
    fails(commands.main, ["merge", str(world), "--out", str(world)], "is among the sets that are read")
    fails(commands.main, ["merge", str(tmp_path), "--out", str(tmp_path / "o")], "has no shard*.tar")


def test_merging_leaves_out_what_is_broken_on_request(world, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    data = (world / "shard-000000.tar").read_bytes()
    (tmp_path / "a" / "shard-000000.tar").write_bytes(data[: len(data) * 3 // 5])
    flags = ["merge", str(tmp_path / "a"), "--out", str(tmp_path / "m")]
    fails(commands.main, flags, "shard-000000.tar: ", "--skip_bad goes on without")
    run(capsys, *flags, "--skip_bad")
    assert [one.key for one in samples(tmp_path / "m")] == ["000000000", "000000001"]


def test_inspect_says_what_a_set_is(world, capsys, tmp_path):
    told = run(capsys, "inspect", world)
    assert f"{world}: 11 samples in 3 shards" in told
    assert "11 of latents [9, 6, 6, 12] float32 text [L, 64] float32" in told
    assert "text: 5 to 5 tokens" in told
    assert samples(world)[0].prompt in told
    assert told.endswith("nothing is broken\n")
    stack = np.stack([one.latents for one in samples(world)]).reshape(-1, 12)
    assert "mean: " + " ".join(f"{value:.2f}" for value in stack.astype(np.float64).mean(0)) in told
    assert "deviation:       " + " ".join(f"{value:.2f}" for value in stack.astype(np.float64).std(0)) in told
    told = run(capsys, "inspect", world, "--index", 10, "--decode", "--out", tmp_path / "x.png")
    assert "shard-000002.tar: 000000010" in told
    assert samples(world)[10].prompt in told
    assert iio.imread(tmp_path / "x.png").shape == (192, 5 * 192, 3)
    fails(commands.main, ["inspect", str(world), "--index", "11"], "--index=11 must be 0 to 10")
    fails(commands.main, ["inspect", str(world), "--decode"], "--decode and --out go together")
    fails(commands.main, ["inspect", str(world), "--decode", "--out", "x.txt"], "must end in .mp4 or .png")


def test_inspect_decodes_by_an_autoencoder(wan, world, tmp_path, capsys):
    latents = np.random.default_rng(0).normal(size=(2, 4, 4, 16)).astype(ml_dtypes.bfloat16)
    write_shard(tmp_path / "shard-000000.tar", [Sample("0", latents, np.ones((3, 24), ml_dtypes.bfloat16), "a fox")])
    flags = ["inspect", str(tmp_path), "--decode", "--out"]
    run(capsys, *flags, tmp_path / "x.mp4", "--vae", wan)
    assert iio.imread(tmp_path / "x.mp4", plugin="pyav").shape == (5, 32, 32, 3)
    fails(commands.main, [*flags, str(tmp_path / "y.mp4")], "0 has 16 channels", "built-in world's", "--vae_path")


def test_inspect_names_what_is_broken(world, tmp_path, capsys):
    good = samples(world)[0]
    write_shard(tmp_path / "shard-0.tar", [good, Sample("short", good.latents[:3], good.text)])
    write_shard(tmp_path / "shard-1.tar", [good, Sample("blank", good.latents, 0 * good.text)])
    data = (tmp_path / "shard-1.tar").read_bytes()
    at = data.index(good.latents.tobytes()[:64])
    (tmp_path / "shard-2.tar").write_bytes(data[:at] + np.float32(np.nan).tobytes() + data[at + 4 :])
    (tmp_path / "shard-3.tar").write_bytes(data[:4000])
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [
        {"name": "shard-0.tar", "bytes": 5, "samples": 2}, {"name": "shard-9.tar", "bytes": 5, "samples": 2}
    ]}))  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        commands.main(["inspect", str(tmp_path)])
    assert stopped.value.code == 1
    broken = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken: ")]
    for words in (
        "keys come more than once: 000000000", "shard-3.tar: ", "shard-2.tar: 000000000: latents NaN or infinite",
        "blank: its text is all zeros", "samples are of 2 kinds", "shard-9.tar is in manifest.json and not there",
        "shard-1.tar is there and not in manifest.json", "manifest.json says 5 and 2",
    ):  # fmt: skip
        assert any(words in line for line in broken), (words, broken)


def test_the_command_and_its_help(capsys):
    for argv in (["--help"], *([name, "--help"] for name in commands.COMMANDS)):
        with pytest.raises(SystemExit) as stopped:
            commands.main(argv)
        assert stopped.value.code == 0
        assert f"usage: python -m rcm_jax.data.prepare{' ' * (len(argv) > 1)}" in capsys.readouterr().out
    for argv in ([], ["video"], ["world", "--out", "x"]):
        with pytest.raises(SystemExit, match="2"):
            commands.main(argv)
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
