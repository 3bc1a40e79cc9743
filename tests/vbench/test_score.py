"""VBench's totals: published rows, files of results, and what is refused."""

import importlib.resources
import json

import pytest

from rcm_jax.vbench.__main__ import main
from rcm_jax.vbench.report import nearest, own_row, published
from rcm_jax.vbench.results import read_results
from rcm_jax.vbench.suites import I2V, SUITES, T2V

PUBLISHED = json.loads(importlib.resources.files("rcm_jax.vbench").joinpath("published.json").read_text())
ROWS = [(name, row["model"]) for name in ("t2v", "i2v") for row in PUBLISHED[name]]
WHOLE = dict.fromkeys(T2V.names, 0.5)


@pytest.mark.parametrize(("suite", "model"), ROWS, ids=lambda name: name)
@pytest.mark.parametrize("clamp", [False, True])
def test_published_rows_add_up(suite, model, clamp):
    """To what is printed beside them: two digits of percent."""
    suite, row = SUITES[suite], published(SUITES[suite])[model]
    own = own_row(suite, {name: row[name] / 100 for name in suite.names}, clamp=clamp)
    for name in (*suite.groups, "total"):
        assert own[name] == pytest.approx(row[name], abs=0.01)


def test_every_published_total_is_the_sum_of_its_groups():
    assert len(ROWS) == 27
    assert len(PUBLISHED["t2v_totals"]) == 31
    for row in PUBLISHED["t2v_totals"]:
        total = (4 * row["quality"] + row["semantic"]) / 5
        assert total == pytest.approx(row["total"], abs=0.0125), row["model"]  # one is printed 0.012 too low


def test_scales_and_weights():
    assert T2V["scene"].normalised(0.8222) == 1
    assert T2V["appearance_style"].normalised(0.0009) == 0
    low, high = WHOLE | {"dynamic_degree": 0.0}, WHOLE | {"dynamic_degree": 1.0}
    gain = T2V.scores(high)["total"] - T2V.scores(low)["total"]
    assert gain == pytest.approx(0.8 * 0.5 / 6.5)
    below = T2V.scores(WHOLE | {"motion_smoothness": 0.1})
    assert below["motion_smoothness"] < 0
    assert T2V.scores(WHOLE | {"motion_smoothness": 0.1}, clamp=True)["motion_smoothness"] == 0


def write(path, found):
    path.write_text(json.dumps(found))
    return path


def test_one_file_or_one_a_dimension(tmp_path):
    whole = write(tmp_path / "all.json", {name: [0.5, []] for name in T2V.names})
    parts = [write(tmp_path / f"{name}_eval_results.json", {name: [0.5, []]}) for name in T2V.names]
    assert read_results([whole]).raw == read_results(parts).raw == WHOLE
    assert read_results([whole]).suite is T2V
    pictures = write(tmp_path / "i2v.json", dict.fromkeys(I2V.names, 0.9))
    assert read_results([pictures]).suite is I2V


def test_the_command(tmp_path, capsys):
    row = published(T2V)["CausVid"]
    results = write(tmp_path / "r.json", {name: [row[name] / 100, []] for name in T2V.names})
    out, drawn = tmp_path / "scores.json", tmp_path / "radar.png"
    main(["score", str(results), "--name", "mine", "--beside", "Luma", "--json", str(out), "--radar", str(drawn)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| VBench, text to video | mine | Luma |"
    assert lines[2] == "| total | 84.27 | 83.61 |"
    told = json.loads(out.read_text())
    assert told["total"] == pytest.approx(0.8427, abs=1e-4)
    assert told["raw"]["scene"] == pytest.approx(0.5658)
    assert drawn.stat().st_size > 20_000
    main(["score", str(results)])
    assert "CausVid" in capsys.readouterr().out.splitlines()[0]  # the nearest is itself


def test_the_nearest_rows():
    names = nearest(published(T2V), 84.4, 3)
    assert len(names) == 3
    assert all(abs(published(T2V)[name]["total"] - 84.4) < 0.1 for name in names)


def videos(*names):
    return [0.5, [{"video_path": f"videos/{name}", "video_results": 0.5} for name in names]]


PROMPTS = [{"prompt_en": "a cat", "dimension": ["subject_consistency"]}, {"prompt_en": "a dog", "dimension": ["color"]}]
REFUSED = [
    ({"subject_consistency": [0.5, []]}, [], "of background_consistency, temporal_flickering"),
    ({name: [0.5, []] for name in (*T2V.names, "Human_Anatomy")}, [], "Human_Anatomy, which is of another version"),
    ({"i2v_subject": [0.9, []], "scene": [0.9, []]}, ["--partial"], "has no"),
    ({"scene": [56.5, []]}, ["--partial"], "scene=56.5 must be a fraction from 0 to 1"),
    ({"scene": ["0.5", []]}, ["--partial"], "scene must be [score, videos]"),
    ({"scene": [None, []]}, ["--partial"], "scene must be [score, videos]"),
    ({}, [], "must hold {dimension: [score, videos]}"),
    ({"color": videos("a dog-0.mp4")}, ["--partial", "--prompts"], "color: 'a dog-1.mp4' is not among its 1 videos"),
    (
        {"color": videos("a dog-0.mp4", "a dog-1.mp4", "b/a dog-0.mp4")},
        ["--partial", "--prompts"],
        "'a dog-0.mp4' is there twice",
    ),
    ({"motion_smoothness": videos("a dog-0.mp4")}, ["--partial", "--prompts"], "'a cat-0.mp4', 'a cat-1.mp4' are not"),
    ({"color": [0.5, []]}, ["--partial", "--beside", "Sora 9"], "--beside 'Sora 9' is no published row"),
    ({"color": [0.5, []]}, ["--partial", "--radar", "r.png"], "a radar plot needs every dimension"),
    ({"color": [0.5, []]}, ["--partial", "--radar", "r.txt"], "--radar=r.txt must end in"),
]  # fmt: skip


@pytest.mark.parametrize(("found", "flags", "why"), REFUSED, ids=[why for *_, why in REFUSED])
def test_what_is_refused(tmp_path, monkeypatch, found, flags, why):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.json", found)
    if "--prompts" in flags:
        flags = [*flags, str(write(tmp_path / "p.json", PROMPTS)), "--samples", "2"]
    with pytest.raises(SystemExit) as stopped:
        main(["score", "r.json", *flags])
    assert why in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_a_dimension_in_two_files(tmp_path):
    one, other = (write(tmp_path / name, {"scene": [0.5, []]}) for name in ("a.json", "b.json"))
    with pytest.raises(ValueError, match=r"scene is in .*a\.json and in .*b\.json: give one of them"):
        read_results([one, other])


def test_means_of_what_there_is(tmp_path, capsys):
    main(["score", str(write(tmp_path / "r.json", {"scene": [0.4111, []]})), "--partial", "--beside", "Luma"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| total |  | 83.61 |"
    assert "| semantic | 50.00 | 84.17 |" in lines
