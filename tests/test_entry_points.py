"""The commands: what they say to bad input, and that they leave what exists alone."""

import importlib
import json

import imageio.v3 as iio
import jax
import numpy as np
import pytest

import rcm_jax
from rcm_jax import demo, evaluate, sample, sample_causal
from rcm_jax.chunks import __main__ as chunks
from rcm_jax.convert import commands
from rcm_jax.data.prepare import __main__ as prepare
from rcm_jax.media.pictures import enlarge, grid
from rcm_jax.media.video import write_video
from rcm_jax.model_file import ModelInfo, load_model, read_info, save_model
from rcm_jax.pipelines.preview import read_previews
from rcm_jax.wan.networks import init_params
from tests.media.videos import moving
from tests.tiny import MODEL

train = importlib.import_module("rcm_jax.train")  # `from rcm_jax import train` is the loop's function
COMMANDS = (sample.main, sample_causal.main, evaluate.main, demo.main, train.main, commands.main, prepare.main)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    info = ModelInfo(model=MODEL, kind="student", world="toy", latent_shape=(9, 6, 6))
    params = init_params(MODEL, jax.random.key(0))
    return str(save_model(tmp_path_factory.mktemp("model") / "student.safetensors", params, info))


def fails(main, argv, *words):
    """The command ends with a non-zero code and one message that has all the words."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    message = str(stopped.value.code)
    assert message.startswith("error: ")
    for word in words:
        assert word in message, message


def test_sample_writes_a_video(tmp_path, student, capsys):
    path = tmp_path / "v.mp4"
    flags = ["--dit_path", student, "--num_steps", "2", "--num_samples", "2", "--scale", "4"]
    sample.main([*flags, "--save_path", str(path)])
    assert capsys.readouterr().out.strip() == str(path)
    videos = rcm_jax.load(student)(num_steps=2, num_samples=2)
    want = enlarge(grid([[video.frames for video in videos]]), 4)
    written = iio.imread(path, plugin="pyav").astype(int)
    assert written.shape == want.shape == (9, 96, 196, 3)
    assert np.abs(written - want).mean() < 12  # lossy, and chroma is halved


def test_evaluate_scores_what_networks_make(tmp_path, student):
    """Random weights show nothing that is asked for; the world's own videos all of it."""
    out = tmp_path / "new" / "scores.json"
    flags = ["--teacher", "", "--num_steps", "1", "--per_caption", "1", "--json", str(out)]
    evaluate.main(["--student", f"a={student},{student}", *flags])
    written = json.loads(out.read_text())
    rows = written["rows"]
    assert list(rows) == ["data", "a 1"]
    assert rows["data"]["all"]["value"] > 0.95
    assert rows["a 1"]["all"]["value"] < 0.2
    assert written["passes"] == {"a 1": 1}
    assert written["all_of_each"]["a 1"] == [rows["a 1"]["all"]["value"]] * 2  # twice the same network


@pytest.mark.slow
def test_the_demo_leaves_what_it_says(tmp_path, capsys):
    demo.main(["--out", str(tmp_path), "--steps", "4", "--per_caption", "1"])
    out = capsys.readouterr().out
    names = (
        "videos.mp4",
        "videos.png",
        "quality.png",
        "scores.txt",
        "scores.json",
        "training.png",
        "student.safetensors",
    )
    for name in names:
        assert (tmp_path / name).is_file()
        assert str(tmp_path / name) in out
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["rows"]["teacher 50 steps"]["all"]["value"] > 0.6
    assert list(written["passes"].values()) == [100, 8, 4, 4, 2, 1]
    previews = read_previews(tmp_path / "training")
    assert [record["step"] for record in previews] == [step for step in range(5) for _ in range(2)]
    student = tmp_path / "student.safetensors"
    assert read_info(student).kind == "student"

    # the same request again: nothing is trained twice, what was there is the same
    before, metrics = load_model(student)[0], (tmp_path / "training" / "metrics.jsonl").read_bytes()
    demo.main(["--out", str(tmp_path), "--steps", "4", "--per_caption", "1"])
    jax.tree.map(np.testing.assert_array_equal, load_model(student)[0], before)
    assert (tmp_path / "training" / "metrics.jsonl").read_bytes() == metrics
    assert read_previews(tmp_path / "training") == previews
    assert json.loads((tmp_path / "scores.json").read_text()) == written


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_steps", "5"], ["5", "1", "4"]),
        (["--num_steps", "0"], ["0", "1", "4"]),
        (["--prompt", "a purple circle moving left"], ["purple", "red"]),
        (["--num_samples", "0"], ["--num_samples=0"]),
        (["--guidance_scale", "3"], ["--guidance_scale does not apply", "student"]),
    ],
)
def test_sample_refuses_and_overwrites_nothing(tmp_path, student, flags, words):
    path = write_video(tmp_path / "v.mp4", moving(), fps=8)
    before = path.read_bytes()
    fails(sample.main, ["--dit_path", student, "--save_path", str(path), *flags], *words)
    assert path.read_bytes() == before


def test_sample_names_what_is_wrong_with_a_path(tmp_path, student):
    fails(sample.main, ["--dit_path", "nowhere.safetensors"], "no model file at nowhere.safetensors")
    (tmp_path / "file").write_text("in the way")
    fails(sample.main, ["--dit_path", student, "--save_path", str(tmp_path / "file" / "v.mp4")], str(tmp_path / "file"))
    fails(sample.main, ["--dit_path", student, "--save_path", str(tmp_path / "v.avi")], "must end in .mp4")


def test_evaluate_and_demo_refuse(tmp_path, student, monkeypatch, capsys):
    fails(evaluate.main, ["--student", "path-without-name"], "NAME=PATH")
    fails(evaluate.main, ["--mid_t", "half"], "--mid_t='half' must be numbers or fractions")
    fails(evaluate.main, ["--mid_t", "5/6"], "4 steps must be 1..2")
    monkeypatch.setattr("rcm_jax.pipelines.scoring.data_row", lambda *_: pytest.fail("computes"))
    fails(evaluate.main, ["--student", "a=nowhere.safetensors"], "no model file at nowhere.safetensors")
    fails(evaluate.main, ["--student", f"a={student}", "--num_steps", "2", "5"], "5", "1", "4")
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--per_caption", "0"])
    assert "--per_caption: 0 must be at least 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    fails(demo.main, ["--out", str(tmp_path / "file" / "out"), "--steps", "2"], "cannot write")


def test_outputs_are_tried_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("rcm_jax.pipelines.scoring.data_row", lambda *_: pytest.fail("computes"))
    monkeypatch.setattr(demo, "train_networks", lambda *_: pytest.fail("computes"))
    (tmp_path / "file").write_text("in the way")
    there = tmp_path / "file" / "x"
    fails(evaluate.main, ["--json", str(there)], f"cannot write --json={there}: {tmp_path}/file is a file")
    fails(evaluate.main, ["--json", str(tmp_path)], f"cannot write --json={tmp_path}: it is a folder")
    fails(demo.main, ["--out", str(there)], f"cannot write --out={there}: {tmp_path}/file is a file")
    fails(demo.main, ["--out", "/proc/demo"], "nothing can be written in /proc/demo")
    fails(chunks.main, ["--save", str(there.with_suffix(".png"))], f"cannot write --save={there}.png")
    fails(chunks.main, ["--save", "mask.txt"], "--save=mask.txt must end in .png, .pdf or .svg")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.optimizer.lrx=1"], 'no such setting: \'lrx\'. Did you mean "lr" instead of "lrx"?'),
        (["--config.optimizer.lr=fast"], "--config.optimizer.lr=fast: could not convert string to float"),
        (["--config.steps=abc"], "--config.steps=abc: invalid literal for int"),
        (["--config.steps=0", "--dry_run"], "steps=0 must be at least 1"),
        (["--config.optimizer.lr=nan", "--dry_run"], "optimizer.lr=nan must be above 0"),
        (["--cofnig.steps=1"], "there is no flag --cofnig.steps; settings are --config.NAME=VALUE"),
        (["stray"], "'stray' belongs to no flag"),
        (["--devices=4"], "--devices=4 is a number of devices to plan for, with --dry_run"),
        ([], "--workdir is missing"),
        (["--workdir=/dev/null/x"], "cannot write --workdir=/dev/null/x: /dev/null is"),
        (["--dry_run", "--config.method.consistency=cm"], "'cm' is unknown; use one of ('scm'"),
        (["--dry_run", "--config.data.latent_shape=(9,7,6)"], "divisible by patch_size"),
    ],
)
def test_train_refuses(flags, words):
    fails(train.main, ["--config=configs/toy_rcm.py", *flags], words)


def test_train_finds_recipes_by_name(tmp_path, monkeypatch):
    wanted = train.read_config("toy_rcm", []).to_json()
    assert train.read_config("configs/toy_rcm.py", []).to_json() == wanted
    assert train.read_config("wan_1_3b_causal_tf:c3-3", []).causal.pattern == "c3-3"
    fails(
        train.main, ["--config=elsewhere/toy_rcm.py"], "no recipe at elsewhere/toy_rcm.py", "toy_rcm, ", "wan_14b_rcm"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from rcm_jax.configs.toy_dmd import get_config")
    assert train.read_config("mine.py", ["--config.steps=7"]).steps == 7


@pytest.mark.parametrize("main", COMMANDS)
def test_a_mistake_in_flags_is_one_line(main, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--config", "--seed", "x", "--no_such_flag"])
    assert stopped.value.code in (1, 2)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_train_refuses_a_teacher_of_another_shape(tmp_path, student):
    flags = ["--config=toy_rcm", f"--workdir={tmp_path}/run", f"--config.teacher={student}"]
    fails(train.main, flags, "do not fit the config", "blocks/self_attn/q/kernel")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["sample", "sample_causal", "evaluate", "demo", "train"])
def test_help_is_there(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"rcm_jax.{module}").main(["--help"])
    assert stopped.value.code == 0
    assert f"usage: python -m rcm_jax.{module} " in capsys.readouterr().out
