import json

import numpy as np
import pytest

from rcm_jax.worlds import toy
from rcm_jax.worlds.toy import scores

FLAGS = ("found", "colour", "shape", "direction", "all")
OTHER = {"circle": "square", "square": "diamond", "diamond": "circle"}


@pytest.fixture(scope="module")
def prompts():
    return scores.evaluation_prompts(4)


@pytest.fixture(scope="module")
def videos(prompts):
    return toy.batch(99, range(len(prompts)), prompts)[0]


@pytest.fixture(scope="module")
def data_summary(videos, prompts):
    return scores.score(videos, prompts)


def rates(videos, captions):
    record = scores.measure(videos, captions)
    return {name: record[name].mean() for name in FLAGS}


# --- one video ---


def test_data_is_right_for_every_caption(videos, prompts):
    record = scores.measure(videos, prompts)
    for name in FLAGS:
        assert record[name].all(), name
    assert record["overlap"].min() > 0.95
    assert record["noise"].max() < 1e-3
    assert record["jitter"].max() < 0.02


def test_data_is_right_after_the_codec():
    codec = toy.ToyCodec.load()
    videos, captions = toy.batch(1, range(192))
    record = scores.measure(np.asarray(codec.decode(codec.encode(videos))), captions)
    assert record["all"].mean() > 0.98
    assert record["overlap"].mean() > 0.85
    assert record["noise"].mean() < 0.02


def test_place_and_size_are_the_scenes():
    scene = toy.scenes(5, range(96))
    record = scores.measure(toy.render(scene), [toy.captions()[i] for i in scene.caption])
    np.testing.assert_allclose(np.stack([record["x"], record["y"]], -1), scene.centre.mean(1), atol=0.2)
    np.testing.assert_allclose(record["radius"], scene.radius, atol=0.15)


def test_time_run_backwards_has_the_wrong_direction_alone(videos, prompts):
    assert rates(videos[:, ::-1], prompts) == {"found": 1, "colour": 1, "shape": 1, "direction": 0, "all": 0}


def test_a_still_or_slanted_path_has_no_direction(videos, prompts):
    still = np.repeat(videos[:, :1], toy.FRAMES, axis=1)
    assert rates(still, prompts)["direction"] == 0
    slanted = np.stack([np.roll(videos[:, f], (f - 4, f - 4), axis=(1, 2)) for f in range(toy.FRAMES)], axis=1)
    along = np.array(["right" in p or "down" in p for p in prompts])  # these only gain a second axis
    assert rates(slanted[along], np.array(prompts)[along].tolist())["direction"] < 0.5


def test_swapped_channels_have_the_wrong_colour_alone(videos, prompts):
    red_or_blue = np.array(["red" in p or "blue" in p for p in prompts])
    swapped = rates(videos[red_or_blue][..., ::-1], [p for p, keep in zip(prompts, red_or_blue, strict=True) if keep])
    assert swapped == {"found": 1, "colour": 0, "shape": 1, "direction": 1, "all": 0}


def test_another_shape_is_the_wrong_shape_alone(prompts):
    captions = [toy.Caption.parse(p) for p in prompts]
    others = [str(toy.Caption(c.colour, OTHER[c.shape], c.direction)) for c in captions]
    videos, _ = toy.batch(99, range(len(prompts)), others)
    assert rates(videos, prompts) == {"found": 1, "colour": 1, "shape": 0, "direction": 1, "all": 0}


@pytest.mark.parametrize("level", [0.1, 0.3])
def test_noise_shows_as_noise_and_leaves_the_rest_readable(videos, prompts, level):
    noisy = videos + np.random.default_rng(0).normal(0, level, videos.shape).astype(np.float32)
    record = scores.measure(noisy, prompts)
    assert record["noise"].mean() == pytest.approx(level, rel=0.1)
    assert record["all"].mean() > 0.97
    assert record["overlap"].mean() < 0.96


def test_a_pulsing_shape_has_size_jitter(prompts):
    scene = toy.scenes(3, range(16), "a green circle moving up")
    size = scene.radius[:, None] * (1 + 0.1 * np.array([-1, 1, -1, 1, 0, 1, -1, 1, -1]))
    cover = toy.coverage("circle", scene.centre, size)[..., None]
    record = scores.measure(
        cover * np.array(toy.COLOURS["green"]) + (1 - cover) * -0.3, ["a green circle moving up"] * 16
    )
    assert record["jitter"].mean() == pytest.approx(0.1 * np.sqrt(8 / 9), rel=0.1)


@pytest.mark.parametrize("kind", ["grey", "nan", "noise", "one empty frame", "tint"])
def test_a_video_without_a_shape_is_all_wrong(videos, prompts, kind):
    rng = np.random.default_rng(0)
    broken = {
        "grey": np.zeros_like(videos),
        "nan": np.full_like(videos, np.nan),
        "noise": rng.normal(0, 1, videos.shape),
        "one empty frame": np.where(np.arange(toy.FRAMES)[:, None, None, None] == 4, 0, videos),
        "tint": np.broadcast_to(np.array(toy.COLOURS["red"]), videos.shape),
    }[kind]
    record = scores.measure(broken, prompts)
    assert all(not record[name].any() for name in FLAGS)
    assert np.isnan(record["x"]).all()
    assert np.isfinite(record["noise"]).all()


def test_wrong_input_is_refused(videos, prompts):
    with pytest.raises(ValueError, match="is not a caption"):
        scores.measure(videos[:1], ["red circle"])
    with pytest.raises(ValueError, match="one a caption"):
        scores.measure(videos[:2], prompts[:1])
    with pytest.raises(ValueError, match="one a caption"):
        scores.measure(videos[:1, :5], prompts[:1])
    with pytest.raises(ValueError, match="at least one"):
        scores.measure(videos[:0], [])


# --- many videos ---


def test_summary_is_json_and_its_intervals_hold_the_estimates(videos, prompts):
    mixed = videos.copy()
    mixed[::3] = mixed[::3, ::-1]  # so that a share lies inside (0, 1)
    summary = scores.score(mixed, prompts)
    json.dumps(summary, allow_nan=False)
    for name, interval in summary.items():
        assert interval["low"] <= interval["value"] <= interval["high"], name
    direction = summary["direction"]
    assert direction["value"] == pytest.approx(2 / 3)
    # as wide as the binomial one, about
    assert direction["high"] - direction["low"] == pytest.approx(2 * 1.96 * np.sqrt(2 / 9 / len(videos)), rel=0.15)
    assert summary == scores.score(mixed, prompts)


def test_data_has_the_worlds_spread(data_summary):
    for name in ("position_ratio", "size_ratio"):
        assert data_summary[name]["low"] < 1 < data_summary[name]["high"]
        assert data_summary[name]["value"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "caption", ["a red circle moving left", "a blue square moving down", "a red diamond moving up"]
)
def test_the_worlds_spread_is_that_of_its_scenes(caption):
    scene = toy.scenes(2, range(4000), caption)
    drawn = {"position_spread": np.sqrt(scene.centre.mean(1).var(0).mean()), "size_spread": scene.radius.std()}
    assert scores.world_spread([caption]) == pytest.approx(drawn, rel=0.03)


def test_spread_is_the_pooled_variance_within_captions(videos, prompts, data_summary):
    record, caption = scores.measure(videos, prompts), np.array(prompts)
    within = [np.stack([record["x"], record["y"]])[:, caption == c].var(1, ddof=1).mean() for c in toy.captions()]
    assert data_summary["position_spread"]["value"] == pytest.approx(np.sqrt(np.mean(within)))


def test_copies_of_one_video_have_no_spread(videos, prompts):
    copies = np.concatenate([videos[:48]] * 3)
    result = scores.diversity(copies, prompts[:48] * 3)
    assert set(result) == {"position_spread", "position_ratio", "size_spread", "size_ratio"}
    np.testing.assert_allclose(list(result.values()), 0, atol=1e-6)


def test_half_the_spread_reads_as_half():
    caption = "a yellow square moving right"
    scene = toy.scenes(1, range(256), caption)
    mean = scene.centre.mean(0)
    narrow = toy.Scenes(scene.caption, scene.radius, scene.speed, scene.background, mean + (scene.centre - mean) / 2)
    wide, half = (scores.diversity(toy.render(s), [caption] * 256) for s in (scene, narrow))
    assert half["position_spread"] / wide["position_spread"] == pytest.approx(0.5, abs=0.02)
    assert wide["position_ratio"] == pytest.approx(1, abs=0.1)


def test_bootstrap_interval_of_the_spread_covers_the_truth():
    # 60 worlds of 16 videos in 4 groups, normal with deviation 2: about 57 intervals of 95% should hold 2
    rng, groups, held = np.random.default_rng(0), np.repeat(np.arange(4), 8), 0
    for trial in range(60):
        values = rng.normal(rng.normal(0, 5, 4)[groups], 2)[:, None]
        _, boots = scores._Resampler(groups, 300, trial).spread(values)
        low, high = np.quantile(boots, [0.025, 0.975])
        held += low < 2 < high
    assert held >= 48


def test_what_cannot_be_measured_is_none(videos, prompts):
    summary = scores.score(videos[:48], prompts[:48])
    assert summary["position_spread"] == summary["size_ratio"] == {"value": None, "low": None, "high": None}
    assert scores.score(videos * 0, prompts)["jitter"]["value"] is None


def test_groups_may_be_wider_than_captions(videos, prompts):
    everything = scores.score(videos, prompts, ["one"] * len(prompts), resamples=10)
    assert (
        everything["position_spread"]["value"] > scores.score(videos, prompts, resamples=10)["position_spread"]["value"]
    )


# --- protocol and table ---


@pytest.mark.parametrize("captions", [12, 48])
def test_prompts_are_balanced(captions):
    prompts = scores.evaluation_prompts(3, captions)
    assert len(prompts) == 3 * captions
    assert prompts[:captions] == prompts[captions : 2 * captions]
    parsed = [toy.Caption.parse(p) for p in prompts]
    for group in ("colour", "shape", "direction"):
        counts = np.unique([getattr(p, group) for p in parsed], return_counts=True)[1]
        assert len(set(counts)) == 1, group
    with pytest.raises(ValueError, match="12 or 48"):
        scores.evaluation_prompts(3, 20)


def test_table_is_aligned(data_summary, videos, prompts):
    grey = scores.score(videos * 0, prompts)
    table = scores.format_table({"data": data_summary, "grey": grey}).split("\n")
    assert len({len(line) for line in table}) == 1
    assert "position spread" in table[0]
    assert "1.00 1.00-1.00" in table[2]
    assert table[3].endswith("-")
    assert scores.format_table({"data": data_summary}, ["all"]).split("\n")[2].split() == ["data", "1.00", "1.00-1.00"]
