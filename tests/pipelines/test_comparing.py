"""Measures that need no network, on videos whose values are known."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import rcm_jax
from rcm_jax import compare
from rcm_jax.chunks import ChunkPattern
from rcm_jax.model_file import ModelInfo, save_model
from rcm_jax.pipelines.comparing import Comparison, Sampled, change, diversity, psnr, table
from rcm_jax.sampling.noise import noise_by_chunks
from rcm_jax.sampling.rollout import chunk_noises
from rcm_jax.worlds import toy
from rcm_jax.worlds.toy.world import ToyWorld
from tests.tiny import MODEL, perturbed_params
from tests.wan.tiny import I2V, write_picture, write_wan

PROMPTS = ["a red circle moving left", "a blue square moving up"]


def test_psnr():
    one = np.zeros((2, 3, 4, 4, 3), np.uint8)
    other = one.copy()
    other[1] += 10
    np.testing.assert_allclose(psnr(one, other, 255.0), [120, 20 * np.log10(25.5)])


def test_diversity_is_of_a_prompts_own_videos():
    videos = np.zeros((4, 2, 4, 4, 3), np.uint8)
    videos[2:] = 100  # of the second prompt, both alike
    assert diversity(videos, 2) == 0
    videos[1] = 30
    assert diversity(videos, 2) == pytest.approx(15)  # 30 for one prompt, 0 for the other
    assert diversity(videos, 1) is None


def test_flicker_is_not_what_changes_steadily():
    steady = np.arange(5, dtype=np.uint8)[None, :, None, None, None] * np.full((1, 1, 4, 4, 3), 7, np.uint8)
    assert change(steady) == pytest.approx(7)
    assert change(steady, 2) == 0
    flickering = np.where(np.arange(5) % 2, 20, 10).astype(np.uint8)[None, :, None, None, None] * np.ones(
        (1, 1, 4, 4, 3), np.uint8
    )
    assert change(flickering, 2) == pytest.approx(20)
    assert change(steady[:, :1]) == 0


def sampled(videos, noise=("same",)):
    frames = np.round((videos + 1) * 127.5).astype(np.uint8)
    return Sampled(frames, videos[:, :, ::4, ::4].astype(np.float32), 0.5, 4.0, noise)


def test_the_worlds_own_scores_and_what_agrees():
    texts = [prompt for prompt in PROMPTS for _ in range(3)]
    videos, _ = toy.batch(0, range(6), texts)
    noise = np.random.default_rng(0).normal(size=videos.shape)
    levels = np.linspace(0.0, 1.0, 6)[:, None, None, None, None]
    worse = np.clip(videos + levels * noise, -1, 1)
    found = {"world": sampled(videos), "noisy": sampled(worse), "other": sampled(videos, ("another",))}
    made = Comparison(found, "world", PROMPTS, 3, ToyWorld())
    rows = made.rows()
    assert rows["world"]["right"] == 1
    assert rows["noisy"]["right"] < 1
    assert "psnr" not in rows["world"]
    assert "psnr" not in rows["other"]  # its noise is another
    assert rows["noisy"]["flicker"] > 2 * rows["world"]["flicker"]
    with_truth = made.goes_with_truth()
    assert with_truth["psnr"] > 0.8  # the noisier a video is, the worse both
    assert with_truth["flicker"] < -0.5
    lines = table(rows).splitlines()
    assert lines[0] == "| | passes | seconds | psnr | psnr latents | diversity | change | flicker | right |"
    assert lines[2].startswith("| world | 4 | 0.5 |  |  |")


def saved(path, causal=None):
    info = ModelInfo(MODEL, "student", "toy", (9, 6, 6), causal=causal)
    return str(save_model(path, perturbed_params(MODEL), info))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("networks") / "student.safetensors")


def test_a_causal_network_and_a_bidirectional_one_have_the_same_noise(network, tmp_path):
    """Where its one chunk is the whole video, a causal network is a bidirectional one."""
    other, out = saved(tmp_path / "other.safetensors", {"pattern": "c9-1"}), tmp_path / "out"
    compare.main([f"a={network}@1", f"b={other}@1", "--samples", "2", "--out", str(out), "--prompt", *PROMPTS])
    assert json.loads((out / "compare.json").read_text())["rows"]["b"]["psnr_latents"] > 100


def test_noise_by_chunks_is_a_streams():
    """Each chunk's own, and the first steps' whatever their number."""
    drawn = noise_by_chunks(7, [3, 1], (2, 5, 2, 3, 4), ChunkPattern(1, 2))
    chunks = chunk_noises(7, jnp.array([3, 1]), 4, (2, 3, 4))
    for chunk, (start, end) in enumerate(((0, 1), (1, 3), (3, 5))):
        np.testing.assert_array_equal(drawn[:, :, start:end], jnp.moveaxis(chunks(chunk, end - start), 0, 1)[:, :2])


@pytest.mark.parametrize(("pattern", "why"), [("c2-2", "does not fit 9 latent frames; these do"), ("4", "like 'c1-4'")])
def test_a_noise_pattern_that_is_none(network, pattern, why):
    pipe = rcm_jax.load(network)
    with pytest.raises(ValueError, match=why):
        pipe.check(PROMPTS, noise_pattern=pattern)
    with pytest.raises(ValueError, match="noise_pattern does not apply: toy_causal is causal"):
        rcm_jax.load("toy_causal").check(PROMPTS, noise_pattern="c1-2")


def test_the_command(network, tmp_path, capsys):
    """A network agrees with itself at the same steps, and not at others."""
    out = tmp_path / "out"
    compare.main([f"a={network}@2", f"b={network}@2", f"{network}@1", "--samples", "2", "--out", str(out), "--prompt",
                  *PROMPTS])  # fmt: skip
    told = json.loads((out / "compare.json").read_text())
    assert told["reference"] == "a"
    assert told["rows"]["b"]["psnr"] == 120
    assert 0 < told["rows"]["student 1"]["psnr"] < 60
    assert told["rows"]["student 1"]["passes"] == 1
    printed = capsys.readouterr().out
    assert "| student 1 | 1 |" in printed
    for name in compare.NAMES:
        assert str(out / name) in printed
        assert (out / name).stat().st_size > 500


@pytest.mark.long
def test_networks_of_wans(tmp_path):
    """Files that do not say what they are: as a teacher and as a student; image to video."""
    folder, picture = str(write_wan(tmp_path / "wan", I2V)), write_picture(tmp_path)
    asked = [
        "--image_path",
        str(picture),
        "--size",
        "32x48",
        "--num_frames",
        "5",
        "--samples",
        "1",
        "--prompt",
        "a fox",
    ]
    compare.main([f"a={folder}@2", f"b={folder}@2", "--students", "b", *asked, "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert (rows["a"]["passes"], rows["b"]["passes"]) == (4, 2)  # the teacher is guided
    assert 0 < rows["b"]["psnr"] < 60
    assert "right" not in rows["b"]


REFUSED = [
    (["toy@4"], "there is nothing to compare"),
    (["toy@4", "toy@4"], "two networks are called 'toy 4'"),
    (["a=toy@4", "b=toy@2", "--reference", "c"], "--reference 'c' is none of a, b"),
    (["a=toy@4", "b=toy@2", "--students", "b", "c"], "--students 'c' is none of a, b"),
    (["a=toy@4", "b=toy@2", "--image_path", "nothing.png"], "there is no image at nothing.png"),
    (["a=toy@4", "b=toy_causal@2", "--num_frames", "5"], "--num_frames"),
    (["runs/lr=1e-4/a.safetensors@4", "b=runs/lr=1e-4/b.safetensors"], "runs/lr=1e-4/a.safetensors"),
    (["a=toy@0", "b=toy"], "'a=toy@0' must be NAME=PATH@STEPS"),
    (["=toy", "b=toy"], "'=toy' must be NAME=PATH@STEPS"),
    (["a=nothing.safetensors", "b=toy"], "nothing.safetensors"),
    (["a=toy@4", "b=toy@2", "--prompt", "a purple haze"], "unknown words"),
    (["a=toy@4", "b=toy@2", "--size", "64x64"], "--size"),
]


@pytest.mark.parametrize(("argv", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_is_refused(tmp_path, monkeypatch, argv, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        compare.main(argv)
    assert why in str(stopped.value)
    assert "\n" not in str(stopped.value)
