"""The demo: what it refuses, what its folder says, and that the same request goes on."""

import dataclasses
import json

import numpy as np
import pytest

from rcm_jax import demo
from rcm_jax.demo import Demo, claim_folder
from rcm_jax.worlds.toy.scores import evaluation_prompts


@pytest.fixture
def untrained(monkeypatch):
    """Training anything fails the test."""

    def trains(*_):
        raise AssertionError("it trains")

    monkeypatch.setattr(demo, "train_networks", trains)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        demo.main(list(argv))
    return f"{stopped.value.code}{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--steps", "0"], "--steps=0 must be at least 1"),
        (["--steps", "-3"], "--steps=-3 must be at least 1"),
        (["--per_caption", "0"], "--per_caption=0 must be at least 1"),
        (["--seed", "-1"], "--seed=-1 must be at least 0 and at most 2147483646"),
        (["--seed", str(2**31)], "--seed=2147483648 must be at least 0"),
        (["--from_scratch", "--teacher_steps", "0"], "--teacher_steps=0 must be at least 1"),
        (["--teacher_steps", "5"], "--teacher_steps=5 needs --from_scratch"),
    ],
)
def test_refuses_before_a_folder_is_made(tmp_path, capsys, untrained, flags, told):
    assert told in refused(capsys, "--out", str(tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


def test_the_folder_says_what_made_it(tmp_path):
    claim_folder(tmp_path / "out", Demo(steps=30, seed=2))
    written = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert written == dataclasses.asdict(Demo(steps=30, seed=2)) | {"version": demo.version()}
    claim_folder(tmp_path / "out", Demo(steps=30, seed=2))  # the same request goes on


def test_another_request_is_refused_with_what_differs(tmp_path, capsys, untrained):
    claim_folder(tmp_path, Demo(steps=30))
    before = (tmp_path / "demo.json").read_text()
    told = refused(capsys, "--out", str(tmp_path), "--steps", "60", "--seed", "1", "--per_caption", "9")
    want = "has a demo with steps 30, per_caption 2, seed 0; this one is with steps 60, per_caption 9, seed 1."
    assert want in told
    assert "--out" in told
    assert "steps 30; this one is with steps as the recipe has it" in refused(capsys, "--out", str(tmp_path))
    assert (tmp_path / "demo.json").read_text() == before


def test_another_version_is_another_request(tmp_path, monkeypatch):
    claim_folder(tmp_path, Demo())
    monkeypatch.setattr(demo, "version", lambda: "9.9")
    with pytest.raises(ValueError, match=r"this one is with version 9\.9\."):
        claim_folder(tmp_path, Demo())


def test_scores_may_take_more_videos_of_the_same_student(tmp_path, capsys):
    claim_folder(tmp_path, Demo(per_caption=1))
    claim_folder(tmp_path, Demo(per_caption=1))
    assert capsys.readouterr().err == ""
    claim_folder(tmp_path, Demo(per_caption=2))
    assert capsys.readouterr().err == "scores anew: 2 videos a caption, 1 before\n"
    assert json.loads((tmp_path / "demo.json").read_text())["per_caption"] == 2


@pytest.mark.parametrize(("name", "text"), [("mine.mp4", "a video"), ("demo.json", "not json"), ("demo.json", "[1]")])
def test_a_folder_of_other_things_is_refused(tmp_path, capsys, untrained, name, text):
    (tmp_path / name).write_text(text)
    told = refused(capsys, "--out", str(tmp_path))
    assert "is not empty, and no demo made it" in told
    assert "--out" in told
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == text


def test_previews_are_spread_over_the_run(tmp_path, monkeypatch):
    """The teacher's weights before the first step, not again where a run goes on; then the student's, four times."""
    seen, configs = [], []

    def score(step, params, info, workdir, *, seed):
        seen.append((step, info.kind, seed))
        (workdir / "scores.jsonl").write_text(json.dumps({"step": step}) + "\n")

    monkeypatch.setattr("rcm_jax.pipelines.preview.score_preview", score)
    monkeypatch.setattr("rcm_jax.training.runs.train_recipe", lambda config, *_, **how: configs.append((config, how)))
    from rcm_jax.configs import toy_rcm

    for _ in range(2):
        demo.distil(demo.recipe(toy_rcm, 100, seed=5), tmp_path)
    assert seen == [(0, "student", 5)]
    assert [config.sample_every for config, _ in configs] == [25, 25]
    configs[0][1]["open_samples"](None)(25, {}, demo_info(), tmp_path)
    assert seen[-1] == (25, "student", 5)


def demo_info():
    from rcm_jax.configs import toy_rcm
    from rcm_jax.training.runs import model_info

    return model_info(demo.recipe(toy_rcm, 100, seed=5))


def test_the_picture_shows_scored_videos_under_their_prompts(tmp_path):
    shown = {"teacher 50 steps": np.zeros((6, 9, 24, 24, 3)), "student 1 step": np.ones((6, 9, 24, 24, 3))}
    demo.picture(shown, {"teacher 50 steps": 100, "student 1 step": 1}, tmp_path)
    import imageio.v3 as iio

    still = iio.imread(tmp_path / "videos.png")
    height, width = 2 * 24 * 3 + 2 * 3, 130 + 6 * 72 * 3 + 5 * 2 * 3
    assert still.shape[1] == width
    body = still[-height:]
    assert (body[:72, 130:346] == 128).all()  # the first network's first prompt: grey
    assert (body[-72:, 130:346] == 255).all()
    assert (still[:-height] < 255).any(), "prompts over the columns"
    assert iio.imread(tmp_path / "videos.mp4", plugin="pyav").shape[0] == 18
    assert set(demo.PICTURE_PROMPTS) <= set(evaluation_prompts(1))
