"""Videos say how they were made, and are made anew: the same to the bit."""

import dataclasses
import json
import os
from importlib.metadata import version

import jax
import numpy as np
import pytest

import rcm_jax
from rcm_jax import sample, sample_causal
from rcm_jax.media.tags import read_tags
from rcm_jax.media.video import write_video
from rcm_jax.model_file import ModelInfo, save_model
from rcm_jax.pipelines.about import fill_in, join, tags
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.pipelines.video import Video, side_by_side
from rcm_jax.wan.networks import init_params
from tests.media.videos import moving
from tests.test_entry_points import fails
from tests.tiny import MODEL

VERSION = version("rcm_jax")
PROMPTS = ["a red circle moving left", "a blue square moving up", "a green diamond moving right"]
STUDENT = ModelInfo(dataclasses.replace(MODEL, remat="none"), "student", "toy", (9, 6, 6))
CAUSAL = dataclasses.replace(
    STUDENT, latent_shape=(5, 6, 6), sigma_max=1600.0, causal={"pattern": "c1-2", "steps_per_chunk": [1]}
)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(3))


@pytest.fixture(scope="module")
def student(tmp_path_factory, params):
    return str(save_model(tmp_path_factory.mktemp("model") / "student.safetensors", params, STUDENT))


@pytest.fixture(scope="module")
def causal(tmp_path_factory, params):
    return str(save_model(tmp_path_factory.mktemp("model") / "causal.safetensors", params, CAUSAL))


@pytest.fixture
def saved(monkeypatch):
    """What is saved, before any encoder: path name -> frames, enlarged no pixel."""
    out, save = {}, Video.save

    def keep(self, path):
        out[os.path.basename(path)] = self
        return save(self, path)

    monkeypatch.setattr(Video, "save", keep)
    return out


def comment(path):
    return json.loads(read_tags(path)["comment"])


def test_sample_makes_a_video_anew(tmp_path, student, saved, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    here = os.path.relpath(student)
    flags = ["--dit_path", here, "--num_steps", "2", "--num_samples", "2", "--seed", "7"]
    sample.main([*flags, "--prompt", PROMPTS[1], "--scale", "3", "--fps", "12", "--save_path", "v.mp4"])
    found = comment(tmp_path / "v.mp4")
    assert read_tags("v.mp4")["title"] == found["prompt"] == PROMPTS[1]
    assert found["options"] == {
        "batch_size": 2, "dit_path": str(tmp_path / here), "num_samples": 2, "num_steps": 2, "seed": 7
    }  # fmt: skip
    assert (found["fps"], found["scale"], found["rcm_jax"], found["command"]) == (12, 3, VERSION, "sample")
    assert found["files"][str(tmp_path / here)]["bytes"] == os.path.getsize(student)
    capsys.readouterr()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # paths hold from anywhere
    sample.main(["--again", "../v.mp4"])
    said = capsys.readouterr()
    assert said.out.strip() == "../v_again.mp4"
    assert "warning" not in said.err
    np.testing.assert_array_equal(saved["v_again.mp4"].frames, saved["v.mp4"].frames)
    assert comment(tmp_path / "v_again.mp4") == found  # x264's bytes differ with the load of the machine
    # through the other kinds of file, and changed by flags beside it
    for source, name, flags in (
        ("../v.mp4", "g.gif", []), ("g.gif", "p.png", []), ("p.png", "w.mp4", ["--seed", "8", "--fps", "6"]),
        ("w.mp4", "x.mp4", ["--seed", "7", "--num_samples", "1"]),
    ):  # fmt: skip
        sample.main(["--again", source, "--save_path", name, *flags])
    for name in ("g.gif", "p.png"):
        np.testing.assert_array_equal(saved[name].frames, saved["v.mp4"].frames)
    other = saved["w.mp4"]
    assert (other.seed, other.fps, other.scale, other.prompt) == (8, 6, 3, PROMPTS[1])
    assert np.abs(other.frames.astype(int) - saved["v.mp4"].frames).max() > 10
    np.testing.assert_array_equal(saved["x.mp4"].frames, saved["v.mp4"].frames[:, :, :24])


def test_one_of_a_file_of_prompts_alone(tmp_path, student, saved):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ["--dit_path", student, "--num_steps", "2", "--num_samples", "2"]
    sample.main([*flags, "--prompts_file", str(tmp_path / "prompts.txt"), "--save_path", str(tmp_path / "v.mp4")])
    assert comment(tmp_path / "v_002.mp4")["options"]["batch_size"] == 6
    sample.main(["--again", str(tmp_path / "v_002.mp4")])
    np.testing.assert_array_equal(saved["v_002_again.mp4"].frames, saved["v_002.mp4"].frames)


def test_a_video_from_python(tmp_path, student, saved):
    videos = rcm_jax.load(student)(PROMPTS, num_steps=np.int64(2), seed=np.uint8(3), indices=np.arange(3))
    videos[2].save(tmp_path / "one.mp4")
    side_by_side(videos, gap=1).save(tmp_path / "all.gif")
    assert comment(tmp_path / "one.mp4")["options"]["indices"] == [2]
    for name in ("one.mp4", "all.gif"):
        again = name.replace(".", "_again.")
        sample.main(["--again", str(tmp_path / name)])
        np.testing.assert_array_equal(saved[again].frames, saved[name].frames)


@pytest.mark.slow
def test_sample_causal_makes_a_video_anew(tmp_path, causal, saved):
    path, grown = tmp_path / "v.png", tmp_path / "grown.mp4"
    flags = ["--dit_path", causal, "--num_samples", "2", "--window", "2", "--num_frames", "9", "--seed", "2"]
    sample_causal.main([*flags, "--mid_t", "15/16", "0.5", "--num_steps", "3", "--save_path", str(path), "--fps", "5"])
    assert comment(path)["options"]["mid_t"] == ["15/16", "0.5"]
    fails(sample.main, ["--again", str(path)], "was made by another command: use python -m rcm_jax.sample_causal")
    sample_causal.main(["--again", str(path), "--save_path", str(tmp_path / "w.gif")])
    np.testing.assert_array_equal(saved["w.gif"].frames, saved["v.png"].frames)
    assert saved["w.gif"].fps == 5
    sample_causal.main(["--again", str(path), "--save_path", str(grown), "--stream"])
    assert comment(grown) == comment(path)
    fails(sample_causal.main, ["--again", str(path), "--stream"], "v_again.png must end in .mp4")


def test_prompts_that_change_go_with_their_video(tmp_path, causal, saved):
    lines, path = tmp_path / "p.txt", tmp_path / "v.png"
    lines.write_text(f"0: {PROMPTS[0]}\n0.3: {PROMPTS[1]}")
    flags = ["--dit_path", causal, "--num_samples", "2", "--prompt_blend", "2"]
    sample_causal.main([*flags, "--prompts_file", str(lines), "--save_path", str(path)])
    lines.write_text("gone")
    assert read_tags(path)["title"] == PROMPTS[0]
    assert comment(path)["options"]["prompts_file"] == [[0, PROMPTS[0]], [0.3, PROMPTS[1]]]
    sample_causal.main(["--again", str(path), "--save_path", str(tmp_path / "again.png")])
    np.testing.assert_array_equal(saved["again.png"].frames, saved["v.png"].frames)
    assert comment(tmp_path / "again.png") == comment(path)
    scenes = f"{PROMPTS[0]}[.3s] | {PROMPTS[1]}[.3s]"
    sample_causal.main(["--again", str(path), "--save_path", str(tmp_path / "scenes.png"), "--prompt", scenes])
    np.testing.assert_array_equal(saved["scenes.png"].frames, saved["v.png"].frames)
    sample_causal.main(["--again", str(path), "--save_path", str(tmp_path / "one.png"), "--prompt", PROMPTS[0]])
    assert (saved["one.png"].frames[3:] != saved["v.png"].frames[3:]).any()
    sample_causal.main(["--again", str(tmp_path / "scenes.png"), "--save_path", str(tmp_path / "other.png")])
    np.testing.assert_array_equal(saved["other.png"].frames, saved["v.png"].frames)
    fails(sample_causal.main, [*flags, "--prompts_file", str(lines)], f"--prompts_file={lines}: 'gone' does not begin")


@pytest.mark.parametrize("main", [sample.main, sample_causal.main])
def test_files_that_say_nothing_of_it(tmp_path, main, params):
    fails(main, ["--again", str(tmp_path / "none.mp4")], "there is no video at")
    (tmp_path / "x.gif").write_text("no picture")
    fails(main, ["--again", str(tmp_path / "x.gif")], "x.gif is not an MP4, GIF or PNG")
    in_memory = Pipeline.of(params, STUDENT).request(PROMPTS[0])
    said = {"prompt": in_memory.prompts[0], "seed": 0, "rcm_jax": VERSION}
    for words in ({}, {"comment": "holidays"}, {"comment": "[3]"}, {"comment": json.dumps(said)}):
        path = write_video(tmp_path / "v.mp4", moving(), 8, words)
        fails(main, ["--again", str(path)], f"--again={path} does not say how it was made")
    newer = {"prompt": "p", "command": main.__module__.split(".")[-1], "options": {"magic": 1}, "rcm_jax": "9.0"}
    path = write_video(tmp_path / "v.mp4", moving(), 8, {"comment": json.dumps(newer)})
    fails(main, ["--again", str(path)], "is of rcm_jax 9.0; this one does not know magic")


def about(**changes):
    return {"prompt": "a", "command": "sample", "options": {"seed": 1, "indices": [0]} | changes, "rcm_jax": VERSION}


def test_videos_of_one_call_are_told_together():
    both = join([about(), about(indices=[1])])
    assert both == about(indices=[0, 1], num_samples=2)
    assert json.loads(tags("a", both, 8, 1)["comment"])["options"] == {"num_samples": 2, "seed": 1}
    others = join([about(negative_prompt="x"), about() | {"prompt": "b"}])
    assert others == about(indices=[0, 0], negative_prompt=["x", ""]) | {"prompt": ["a", "b"]}
    assert join([about(), about(seed=2)]) == join([{}, {}]) == join([both, both]) == {}
    assert join([both]) == both
    assert tags("a", {}, 8, 1) == {"title": "a"}


def test_flags_overrule_and_numbers_a_video_go_with_their_videos(tmp_path):
    def filled(known, **given):
        path = write_video(tmp_path / "v.mp4", moving(), 8, tags("a", known, 8, 2))
        given = {"prompts_file": None} | given
        fill_in(given, path, "sample")
        return {name: value for name, value in given.items() if value is not None}

    known = about(indices=[3], batch_size=4)
    assert filled(known) == {"prompt": "a", "fps": 8, "scale": 2, "seed": 1, "indices": [3], "batch_size": 4}
    assert filled(known, prompt="b", seed=5, fps=3.0) == {
        "prompt": "b", "fps": 3.0, "scale": 2, "seed": 5, "indices": [3], "batch_size": 4
    }  # fmt: skip
    assert filled(known, num_samples=2, fsdp=2, scale=4) == {
        "prompt": "a", "fps": 8, "scale": 4, "seed": 1, "num_samples": 2, "fsdp": 2
    }  # fmt: skip
    several = about(indices=[0, 1], negative_prompt=["x", "y"]) | {"prompt": ["a", "b"]}
    assert filled(several, prompt="c") == {"prompt": "c", "fps": 8, "scale": 2, "seed": 1}
    assert filled(several)["negative_prompt"] == ["x", "y"]


@pytest.mark.parametrize(
    ("stored", "given", "gone"),
    [
        (
            {"steps_per_chunk": [4, 2], "mid_t_schedules": "5/6;"},
            {"num_steps": 1},
            {"steps_per_chunk", "mid_t_schedules"},
        ),
        ({"mid_t_schedules": "5/6;"}, {"mid_t": "5/6"}, {"mid_t_schedules"}),
        ({"resolution": "720p"}, {"size": "832x480"}, {"resolution"}),
        ({"size": "832x480"}, {"resolution": "720p"}, {"size"}),
        ({"dit_path": "x", "kind": "teacher"}, {"model": "toy", "distilled": True}, {"dit_path", "kind", "scale"}),
        ({"kind": "teacher"}, {"model": None, "distilled": False}, set()),
    ],
)
def test_a_flag_takes_the_place_of_what_it_excludes(tmp_path, stored, given, gone):
    path = write_video(tmp_path / "v.mp4", moving(), 8, tags("a", about(**stored), 8, 2))
    filled = dict(given)
    fill_in(filled, path, "sample")
    assert {*stored, "scale"} - filled.keys() == gone
    assert {name: filled[name] for name in given} == given


@pytest.mark.long
def test_what_takes_too_long_names_the_flag_that_lifts_it(tmp_path, student, causal, monkeypatch):
    seconds = iter(range(0, 10**7, 10**4))
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    out = ["--save_path", str(tmp_path / "v.png"), "--num_steps", "1"]
    many = ["--dit_path", student, "--num_samples", "4", "--batch_size", "1"]
    for main, flags in ((sample.main, many), (sample_causal.main, ["--dit_path", causal])):
        fails(main, [*flags, *out], "are left, more than 1 hour; with --yes it goes on all the same")
        main([*flags, *out, "--yes"])
        (tmp_path / "v.png").unlink()


def test_what_has_changed_is_said(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(bytes(10))
    known = about() | {"files": {str(model): {"bytes": 11, "modified": 0}}, "jax": "0.1", "rcm_jax": "0.0.1"}
    path = write_video(tmp_path / "v.mp4", moving(), 8, tags("a", known, 8, 2))
    with pytest.warns(UserWarning, match="it may become another video") as said:
        fill_in({}, path, "sample")
    lines = sorted(str(w.message) for w in said)
    assert lines[0].startswith(f"{model} has changed or gone since {path} was made")
    assert lines[1].startswith("jax was 0.1 and is ")
    assert lines[2].startswith(f"rcm_jax was 0.0.1 and is {VERSION} since")


# --- more videos than a file holds ------------------------------------------------------------------------------------


def test_many_samples_are_in_rows(tmp_path, student, saved):
    flags = ["--dit_path", student, "--num_steps", "1", "--batch_size", "7"]
    sample.main([*flags, "--num_samples", "21", "--save_path", str(tmp_path / "v.png")])
    assert saved["v.png"].frames.shape == (9, 2 * 25 - 1, 11 * 25 - 1, 3)


def test_more_than_fit_are_refused_before_sampling(tmp_path, student, causal, monkeypatch):
    monkeypatch.setattr("rcm_jax.pipelines.bidirectional.sample_batches", lambda *_, **__: pytest.fail("computes"))
    monkeypatch.setattr("rcm_jax.sampling.stream.profile", lambda *_, **__: pytest.fail("computes"))
    out = ["--save_path", str(tmp_path / "v.mp4"), "--num_samples", "401"]
    words = ("--num_samples: 401 videos of 192x192 do not fit a file of 4096x4096 pixels, 400 do", "--seed")
    fails(sample.main, ["--dit_path", student, *out], *words)
    fails(sample_causal.main, ["--dit_path", causal, *out], *words)
    fails(
        sample.main,
        ["--dit_path", student, *out[:2], "--scale", "200"],
        "a video of 4800x4800 pixels",
        "smaller --size or --scale",
    )


@pytest.mark.parametrize("main", [sample.main, sample_causal.main])
def test_rates_and_places_are_tried_first(tmp_path, main):
    nowhere = ["--dit_path", "nowhere.safetensors"]
    fails(main, [*nowhere, "--fps", "121"], "--fps=121.0 must be at least 0.01 and at most 120")
    fails(main, [*nowhere, "--fps", "60", "--save_path", "x.gif"], "at most 50 in a GIF")
    fails(
        main, [*nowhere, "--save_path", "/proc/v.mp4"], "cannot write --save_path=/proc/v.mp4: nothing can be written"
    )
    fails(main, [*nowhere, "--save_path", str(tmp_path)], "must end in .mp4, .gif or .png")
