"""A list of prompts made into the videos that VBench looks for."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from rcm_jax.convert.load import load_params
from rcm_jax.media.tags import read_tags
from rcm_jax.pipelines import networks
from rcm_jax.vbench import prompts as lists
from rcm_jax.vbench import sampling
from rcm_jax.vbench.__main__ import main
from rcm_jax.vbench.prompts import Entry, check_case, read_prompts
from tests.wan.tiny import I2V, write_wan

COLOURS = "red", "blue"
RED, BLUE = "a red circle moving left", "a blue square moving up"
LIST = [
    {"prompt_en": RED, "dimension": ["scene", "background_consistency"], "auxiliary_info": {"scene": {"scene": "x"}}},
    {"prompt_en": BLUE, "dimension": ["color"]},
    {"prompt_en": RED, "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
]


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(LIST))
    return path


def sampled(capsys, listed, out, *flags):
    main(["sample", "--prompts", str(listed), "--out", str(out), "--num_steps", "2", "--samples", "2", *flags])
    return capsys.readouterr().out


def stopped(*flags):
    with pytest.raises(SystemExit) as raised:
        main(["sample", *map(str, flags)])
    assert "\n" not in str(raised.value)
    return str(raised.value)


def frames_of(path):
    with av.open(path) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def files(out):
    return {path.name: path.read_bytes() for path in out.glob("*.mp4")}


def test_a_prompt_is_sampled_once(listed):
    red, blue = read_prompts(listed)
    assert (red.prompt, red.dimensions) == (RED, ("scene", "background_consistency", "color"))
    assert red.auxiliary == {"scene": {"scene": "x"}, "color": {"color": "red"}}
    assert blue == Entry(BLUE, ("color",))


def test_rcms_form(tmp_path, capsys):
    """Files are named by the prompt, and the augmented one is sampled."""
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"prompt": "square", "dimensions": ["color"], "augmented_prompt": BLUE}]))
    sampled(capsys, path, tmp_path / "long", "--samples", "1")
    assert read_tags(tmp_path / "long/square-0.mp4")["title"] == BLUE
    sampled(capsys, path, tmp_path / "short", "--samples", "1", "--text", "original")
    assert read_tags(tmp_path / "short/square-0.mp4")["title"] == "square"


def test_names_noises_and_the_list(listed, tmp_path, capsys):
    out = tmp_path / "videos"
    told = sampled(capsys, listed, out)
    assert told.strip() == f"4 videos made, 4 there; what to run VBench on: {out / 'vbench_info.json'}"
    assert set(files(out)) == {f"{prompt}-{i}.mp4" for prompt in (RED, BLUE) for i in (0, 1)}
    told = json.loads((out / "vbench_info.json").read_text())
    assert told[1] == {
        "prompt_en": BLUE, "dimension": ["color"], "video_list": [str(out / f"{BLUE}-{i}.mp4") for i in (0, 1)]
    }  # fmt: skip
    assert told[0]["auxiliary_info"]["color"] == {"color": "red"}
    seeds = {name: json.loads(read_tags(out / name)["comment"]) for name in files(out)}
    assert {(name[-5], about["options"]["seed"]) for name, about in seeds.items()} == {("0", 0), ("1", 1)}
    first, second = (frames_of(out / f"{RED}-{i}.mp4").astype(int) for i in (0, 1))
    assert np.abs(first - second).mean() > 1


def test_it_goes_on_where_it_was_stopped(listed, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sampled(capsys, listed, whole)
    told = sampled(capsys, listed, parts, "--process", "1", "--num_processes", "2")
    assert told == f"2 videos made; 2 of other processes are missing, the first '{RED}-0.mp4'\n"
    assert not (parts / "vbench_info.json").exists()
    (parts / f"{BLUE}-1.mp4").unlink()
    left = (parts / f"{BLUE}-0.mp4").stat().st_mtime_ns
    assert sampled(capsys, listed, parts).startswith("3 videos made, 4 there")
    assert (parts / f"{BLUE}-0.mp4").stat().st_mtime_ns == left
    for name in files(whole):
        one, other = frames_of(whole / name).astype(int), frames_of(parts / name).astype(int)
        assert np.abs(one - other).mean() < 0.5  # another batch, another program: a level, through the encoder
    why = stopped("--prompts", listed, "--out", parts, "--num_steps", 4, "--samples", 2)
    assert "has videos made with sampling.num_steps=2, not 4: give another folder" in why


@pytest.mark.long
def test_causal_networks_are_streamed(listed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rcm_jax.pipelines.pipeline.Pipeline.videos", None)
    out = tmp_path / "videos"
    sampled(capsys, listed, out, "--dit_path", "toy_causal", "--samples", "1", "--cache_policy", "rolling_sink",
            "--total_blocks", "3", "--sink_blocks", "2", "--num_frames", "13")  # fmt: skip
    assert set(files(out)) == {f"{RED}-0.mp4", f"{BLUE}-0.mp4"}
    assert frames_of(out / f"{RED}-0.mp4").shape[0] == 13
    assert not list(out.glob(".*"))


@pytest.mark.long
def test_image_to_video_of_wans(tmp_path, capsys, monkeypatch):
    """Every prompt from its own image, with Wan's files; the network is read once."""
    read = []
    monkeypatch.setattr(networks, "load_params", lambda *a, **k: read.append(a) or load_params(*a, **k))
    pictures, out, path = tmp_path / "pictures", tmp_path / "videos", tmp_path / "i2v.json"
    pictures.mkdir()
    for colour in COLOURS:
        Image.new("RGB", (48, 32), colour).save(pictures / f"{colour}.png")
    entries = [
        {"prompt_en": f"a {c} fox", "dimension": ["i2v_subject"], "image_name": f"{c}.png", "image_type": "animal"}
        for c in COLOURS
    ]
    path.write_text(json.dumps(entries))
    folder = write_wan(tmp_path / "wan", I2V)
    asked = ["--dit_path", str(folder), "--kind", "student", "--images", str(pictures), "--num_frames", "5", "--size"]
    told = sampled(capsys, path, out, *asked, "32x48")
    assert told.startswith("4 videos made, 4 there")
    assert len(read) == 1
    seeds = {p.name: json.loads(read_tags(p)["comment"])["options"]["seed"] for p in out.glob("*.mp4")}
    assert seeds == {f"a {c} fox-{i}.mp4": i for c in COLOURS for i in (0, 1)}
    of_red, of_blue = (frames_of(out / f"a {c} fox-0.mp4").astype(int) for c in COLOURS)
    assert of_red.shape == of_blue.shape == (5, 48, 32, 3)
    assert np.abs(of_red - of_blue).mean() > 1
    told = json.loads((out / "vbench_info.json").read_text())
    assert [(entry["prompt_en"], entry["image_type"]) for entry in told] == [
        ("a red fox", "animal"), ("a blue fox", "animal")
    ]  # fmt: skip


REFUSED = [
    ([{"prompt_en": "a cat"}], "entry 0: 'a cat' has no dimension to be measured in"),
    ([{"prompt_en": "a cat", "dimension": []}], "'a cat' has no dimension"),
    ([{"prompt_en": "a cat", "dimension": ["beauty"]}], "'beauty' is no dimension of VBench's"),
    ([{"dimension": ["color"]}], "entry 0: there is no prompt_en"),
    (["a cat"], "entry 0: there is no prompt_en"),
    ({"a cat": ["color"]}, "must be a list of {prompt_en, dimension}"),
    ([{"prompt_en": "a/b", "dimension": ["color"]}, {"prompt_en": "a-b", "dimension": ["color"]}],
     "two prompts' videos are called 'a-b-0.mp4'"),
    ([{"prompt_en": "x", "dimension": ["i2v_subject"], "image_name": "x.jpg"}], "give their folder as --images"),
    ([{"prompt_en": "x", "dimension": ["camera_motion"]}], "entry 0: 'x' has no image_name, and camera_motion is"),
    ([{"prompt_en": "x", "dimension": 5}], "entry 0: dimension must be a name or a list of names, not 5"),
    ([{"prompt_en": "x", "dimension": [["color"]]}], "must be a name or a list of names, not [['color']]"),
    ([{"prompt_en": "x", "dimension": "color", "image_name": 3}], "entry 0: image_name must be a text, not 3"),
    ([{"prompt_en": "x", "dimension": "color", "image_type": [1]}], "entry 0: image_type must be a text, not [1]"),
    ([{"prompt_en": "x", "dimension": "color", "auxiliary_info": "red"}], "auxiliary_info must be {dimension: …}"),
    ([{"prompt_en": "x", "dimension": "color", "augmented_prompt": 7}], "augmented_prompt must be a text, not 7"),
    ([{"prompt_en": "x", "dimension": "color", "augmented_prompt": one} for one in "ab"],
     "entry 1: 'x' has another augmented_prompt here than before"),
    ('[{"prompt_en": ' + 5000 * "9" + "}]", "list.json is no JSON that can be read"),
    ('[{"prompt_en": "x", "prompt_en": "y", "dimension": "color"}]', "'prompt_en' is twice in one object"),
    ([{"prompt_en": 260 * "x", "dimension": "color"}], "is too long for a file's name (255 bytes)"),
    ([{"prompt_en": 90 * "猫", "dimension": "color"}], "is too long for a file's name (255 bytes)"),
    ([{"prompt_en": "a\0b", "dimension": "color"}], "has a NUL"),
    ([{"prompt_en": "\ud800", "dimension": "color"}], "has half a character"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_lists_that_are_refused(tmp_path, content, why):
    path = tmp_path / "list.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert why in stopped("--prompts", path, "--out", tmp_path / "videos")
    assert not (tmp_path / "videos").exists()


def test_images(tmp_path, listed):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    path = tmp_path / "i2v.json"
    path.write_text(json.dumps([{"prompt_en": RED, "dimension": ["i2v_subject"], "image_name": "red.png"}]))
    flags = ["--out", tmp_path / "videos", "--images", pictures]
    assert f"{pictures} has no 'red.png' (1 images are missing)" in stopped("--prompts", path, *flags)
    assert "--images" in stopped("--prompts", listed, *flags)
    assert "--process=2 must be 0 to 1" in stopped(
        "--prompts", path, "--out", tmp_path / "v", "--process", 2, "--num_processes", 2
    )


def test_prompts_that_differ_in_case_alone(tmp_path, monkeypatch):
    two = [Entry("A fantasy landscape", ("appearance_style",)), Entry("a fantasy landscape", ("scene",))]
    asked = []
    monkeypatch.setattr(lists, "_tells_case", lambda folder: asked.append(folder))
    with pytest.raises(ValueError, match="'A fantasy landscape' would overwrite those of 'a fantasy landscape'"):
        check_case(two, tmp_path / "not" / "there")
    assert asked == [tmp_path]
    monkeypatch.setattr(lists, "_tells_case", lambda folder: True)
    check_case(two, tmp_path)


def test_every_image_is_opened_before_the_first_video(tmp_path, monkeypatch):
    pictures, path = tmp_path / "pictures", tmp_path / "i2v.json"
    pictures.mkdir()
    Image.new("RGB", (48, 32), "red").save(pictures / "red.png")
    (pictures / "blue.png").write_text("no image")
    entries = [{"prompt_en": f"a {c} fox", "dimension": ["i2v_subject"], "image_name": f"{c}.png"} for c in COLOURS]
    path.write_text(json.dumps(entries))
    folder = write_wan(tmp_path / "wan", I2V)
    why = stopped("--prompts", path, "--out", tmp_path / "videos", "--dit_path", folder, "--kind", "teacher",
                  "--images", pictures, "--num_frames", 5, "--size", "48x32")  # fmt: skip
    assert "blue.png is not an image that can be read" in why
    entries[1] = {"prompt_en": "a fox of no image", "dimension": ["color"]}
    path.write_text(json.dumps(entries))
    why = stopped("--prompts", path, "--out", tmp_path / "videos", "--dit_path", folder, "--kind", "teacher",
                  "--images", pictures, "--num_frames", 5, "--size", "48x32")  # fmt: skip
    assert "'a fox of no image': " in why
    assert not (tmp_path / "videos").exists()


def test_streams_from_several_images_read_their_texts_together(tmp_path, monkeypatch):
    """And the negative one under guidance: a large encoder is read once for all of them."""

    class Made(list):
        about, fps = {}, 16

    read, asked = [], []
    pipe = SimpleNamespace(
        world=SimpleNamespace(scale=1, encode_text=read.append),
        sampling=lambda **options: SimpleNamespace(guidance=3.0),
        streams=lambda texts, **options: asked.append(options) or (Made() for _ in texts),
    )
    monkeypatch.setattr(sampling, "WrittenBehind", lambda path, *_, **__: nullcontext(path.write_text("a video")))
    jobs = [sampling.Job(Entry(c, ()), i, tmp_path / f"{c}-{i}.mp4", c, tmp_path / c) for i in (0, 1) for c in COLOURS]
    list(sampling._streamed(pipe, jobs, {"seed": 5}))
    assert read == [["red", "blue", "red", "blue", ""]]
    assert [(one["seed"], one["image_path"].name) for one in asked] == [
        (seed, colour) for seed in (5, 6) for colour in COLOURS
    ]
    assert len(list(tmp_path.iterdir())) == 4


def test_words_that_the_built_in_world_lacks(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([LIST[0], {"prompt_en": "a cat", "dimension": "color"}]))
    assert "unknown words ['cat']" in stopped("--prompts", tmp_path / "list.json", "--out", tmp_path / "videos")
    assert not (tmp_path / "videos").exists()


def test_a_prompt_with_a_colon_and_long_names(tmp_path, capsys, monkeypatch):
    """FFmpeg reads protocols off the names of files; the longest names have 255 bytes."""
    monkeypatch.chdir(tmp_path)
    words = ["Surreal: a cat", 246 * "x"]
    entries = [{"prompt": w, "dimension": "color", "augmented_prompt": RED} for w in words]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    sampled(capsys, "list.json", ".", "--samples", "1")
    assert {path.name for path in tmp_path.glob("*.mp4")} == {f"{w}-0.mp4" for w in words}
    assert frames_of(f"./{words[0]}-0.mp4").shape[0] > 1
