"""VBench's totals: published rows, files of results, and what is refused."""

import importlib.resources
import json

import numpy as np
import pytest
from PIL import Image

from rcm_jax.vbench import report
from rcm_jax.vbench.__main__ import main
from rcm_jax.vbench.report import draw_radar, nearest, own_row, published
from rcm_jax.vbench.results import read_results
from rcm_jax.vbench.suites import I2V, SUITES, T2V

PUBLISHED = json.loads(importlib.resources.files("rcm_jax.vbench").joinpath("published.json").read_text())
ROWS = [(name, row["model"]) for name in ("t2v", "i2v") for row in PUBLISHED[name]]
WHOLE = dict.fromkeys(T2V.names, 0.5)
INSIDE = {d.name: (d.low + d.high) / 2 for d in T2V.dimensions}
PRINTED_LOW = "Wan2.1-14B (rCM paper)"  # 83.592 from its groups, printed 83.58


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
        name = f"{row['model']} ({row['protocol']})"
        assert total == pytest.approx(row["total"], abs=0.0125 if name == PRINTED_LOW else 0.0101), name


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
    assert told["partial"] is False
    assert told["missing"] == []
    with Image.open(drawn) as picture:
        assert picture.format == "PNG"
    main(["score", str(results)])
    assert "CausVid" in capsys.readouterr().out.splitlines()[0]  # the nearest is itself


def test_a_name_is_one_rows(tmp_path):
    """Or a published row would stand for one's own, in the table and in the picture."""
    row = published(T2V)["CausVid"]
    results = write(tmp_path / "r.json", {name: [row[name] / 100, []] for name in T2V.names})
    out = tmp_path / "scores.json"
    for flags in (["--name", "Luma", "--beside", "Luma"], ["--name", "CausVid"]):
        with pytest.raises(SystemExit) as stopped:
            main(["score", str(results), *flags, "--json", str(out)])
        assert f"--name {flags[1]!r} is also the published row shown beside it" in str(stopped.value)
    assert not out.exists()


def lines_of(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_what_the_radar_draws():
    rows = {"mine": own_row(T2V, INSIDE), "Luma": published(T2V)["Luma"], "totals": {"total": 80.0}}
    figure = draw_radar(T2V, rows)
    lines = lines_of(figure)
    assert set(lines) == {"mine", "Luma"}
    for name, line in lines.items():
        heights = [100 * T2V[d].normalised(rows[name][d] / 100) for d in T2V.names]
        np.testing.assert_allclose(line.get_ydata(), [*heights, heights[0]])
        np.testing.assert_allclose(line.get_xdata()[:-1], np.arange(16) * np.pi / 8)
    assert figure.axes[0].get_ylim() == (0, 100)


def test_the_radar_shows_what_is_beyond_the_ranges():
    """Wider, with the ranges' ends as circles; with clamped scores as wide as ever."""
    raw = INSIDE | {"motion_smoothness": 0.6, "appearance_style": 0.4}
    low, high = (100 * T2V[name].normalised(raw[name]) for name in ("motion_smoothness", "appearance_style"))
    assert low < 0
    assert high > 100
    figure = draw_radar(T2V, {"mine": own_row(T2V, raw)})
    assert figure.axes[0].get_ylim() == pytest.approx((low, high))
    own, *circles = figure.axes[0].get_lines()
    assert min(own.get_ydata()) == pytest.approx(low)
    assert max(own.get_ydata()) == pytest.approx(high)
    assert [set(circle.get_ydata()) for circle in circles] == [{0.0}, {100.0}]
    clamped = draw_radar(T2V, {"mine": own_row(T2V, raw)}, clamp=True)
    assert clamped.axes[0].get_ylim() == (0, 100)
    heights = lines_of(clamped)["mine"].get_ydata()
    assert (min(heights), max(heights)) == (0, 100)


def test_the_command_draws_what_its_table_says(tmp_path, monkeypatch):
    """One's own row first, clamped where the table is."""
    drawn = []
    monkeypatch.setattr(report, "radar", lambda suite, rows, path, **how: drawn.append((list(rows), how)))
    results = write(tmp_path / "r.json", {name: [value, []] for name, value in INSIDE.items()})
    for flags, clamp in (([], False), (["--clamp"], True)):
        main(["score", str(results), "--beside", "Luma", "--radar", str(tmp_path / "r.png"), *flags])
        assert drawn.pop() == (["this", "Luma"], {"clamp": clamp})


def test_the_last_line_says_what_is_beyond_the_ranges(tmp_path, capsys):
    raw = dict.fromkeys(T2V.names, 0.2) | {"motion_smoothness": 0.1}
    results = write(tmp_path / "r.json", {name: [value, []] for name, value in raw.items()})
    for flags, how in (([], "not clamped"), (["--clamp"], "clamped")):
        main(["score", str(results), "--beside", "Luma", *flags])
        last = capsys.readouterr().out.splitlines()[-1]
        assert f", and {how}: background consistency (-8.33), temporal flickering" in last
        assert "motion smoothness (-207.89)" in last


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
    (
        {"motion_smoothness": videos("a cat-7.mp4")},
        ["--partial", "--suite", "t2v", "--prompts"],
        "'a cat-7' is past the 2 samples",
    ),
    (
        {"dynamic_degree": videos("a cat-1.mp4")},
        ["--partial", "--suite", "t2v", "--prompts"],
        "'a cat-0.mp4' is not among its 1 videos",
    ),
    (
        {"color": videos("a dog-0.mp4", "a dog-1.mp4", "a cat-0.mp4")},
        ["--partial", "--prompts"],
        "color: 'a cat-0.mp4' is of no prompt of the list that is measured in it",
    ),
    (
        {"color": videos("a dog-0.mp4", "a dog-1.mp4", "a dog-01.mp4")},
        ["--partial", "--prompts"],
        "'a dog-01.mp4' is of no prompt of the list",
    ),
    (
        {"color": videos("a dog-0.mp4", "a dog-0.gif")},
        ["--partial"],
        "'a dog-0.mp4', 'a dog-0.gif' are there twice",
    ),
    ({"color": videos("b/a dog-0.mp4", "a dog-0.mp4")}, ["--partial"], "'a dog-0.mp4' is there twice"),
    ({"color": [0.5, []]}, ["--partial", "--prompts"], "color has a score and no videos"),
    ({"color": [0.5, [{"video_results": 1}]]}, ["--partial", "--prompts"], "1 of its 1 videos have no video_path"),
    ({"color": [0.5, [{"video_path": 5}]]}, ["--partial"], "a video_path of color must be a text, not 5"),
    ({"scene": videos("a dog-0.mp4")}, ["--partial", "--prompts"], "scene has a score, and no prompt of the list"),
    ({"color": [10**400, []]}, ["--partial"], "must be a fraction from 0 to 1"),
    ('{"color": [0.5, []], "scene": [0.5, []], "color": [0.9, []]}', ["--partial"], "'color' is twice in one object"),
    ('{"color": [' + 5000 * "9" + ", []]}", ["--partial"], "r.json is no JSON that can be read"),
    (100_000 * "[", ["--partial"], "r.json is no JSON that can be read"),
    ({"subject_consistency": [0.5, []]}, ["--partial"], "subject_consistency: text and image to video both have it"),
    ({"color": [0.5, []]}, ["--partial", "--beside", "Sora 9"], "--beside 'Sora 9' is no published row"),
    ({"color": [0.5, []]}, ["--partial", "--radar", "r.png", "--json", "s.json"], "--radar draws every dimension"),
    ({"color": [0.5, []]}, ["--partial", "--radar", "r.txt"], "--radar=r.txt must end in"),
]  # fmt: skip


@pytest.mark.parametrize(("found", "flags", "why"), REFUSED, ids=[why for *_, why in REFUSED])
def test_what_is_refused(tmp_path, monkeypatch, found, flags, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text(found if isinstance(found, str) else json.dumps(found))
    if "--prompts" in flags:
        flags = [*flags, str(write(tmp_path / "p.json", PROMPTS)), "--samples", "2"]
    with pytest.raises(SystemExit) as stopped:
        main(["score", "r.json", *flags])
    assert why in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not {path.name for path in tmp_path.iterdir()} & {"r.png", "s.json"}


def checked(tmp_path, found, prompts, *flags):
    results, listed = write(tmp_path / "r.json", found), write(tmp_path / "p.json", prompts)
    main(["score", str(results), "--prompts", str(listed), "--suite", "t2v", "--partial", "--samples", "2", *flags])


def test_samples_that_a_filter_kept(tmp_path, capsys):
    """Of 25 samples those that move: as many as asked for, of any numbers."""
    prompts = [{"prompt_en": p, "dimension": ["temporal_flickering"]} for p in ("a cat", "a dog")]
    kept = ["a cat-24.mp4", "a cat-3.mp4", "a dog-0.mp4", "a dog-1.mp4"]
    checked(tmp_path, {"temporal_flickering": videos(*kept)}, prompts)
    assert "| temporal flickering | 50.00 |" in capsys.readouterr().out
    for others, count in ((kept[1:], 1), ([*kept, "a cat-5.mp4"], 3)):
        with pytest.raises(SystemExit, match=f"of 'a cat' there are {count} videos, not 2"):
            checked(tmp_path, {"temporal_flickering": videos(*others)}, prompts)


def test_a_dimension_has_the_prompts_that_name_it(tmp_path, capsys):
    """And the suite's only where none does."""
    prompts = [
        {"prompt_en": "a cat", "dimension": ["background_consistency", "scene"]},
        {"prompt_en": "a dog", "dimension": ["scene"]},
    ]
    found = {"background_consistency": videos("a cat-0.mp4", "a cat-1.mp4")}
    checked(tmp_path, found, prompts)
    prompts[0]["dimension"] = ["scene"]
    with pytest.raises(SystemExit, match="'a dog-0.mp4', 'a dog-1.mp4' are not among its 2 videos"):
        checked(tmp_path, found, prompts)


def test_a_dimension_in_two_files(tmp_path):
    one, other = (write(tmp_path / name, {"scene": [0.5, []]}) for name in ("a.json", "b.json"))
    with pytest.raises(ValueError, match=r"scene is in .*a\.json and in .*b\.json: give one of them"):
        read_results([one, other])


def test_means_of_what_there_is(tmp_path, capsys):
    main(["score", str(write(tmp_path / "r.json", {"scene": [0.4111, []]})), "--partial", "--beside", "Luma"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| VBench, text to video | this (partial) | Luma |"
    assert lines[2] == "| total |  | 83.61 |"
    assert "| semantic | 50.00 | 84.17 |" in lines
    assert lines[-1].startswith("partial: means of what there is, without subject consistency, background consistency,")


def test_a_partial_total_stands_alone(tmp_path, capsys):
    """It would be like totals that it is not like; the file says so, too."""
    results, out = write(tmp_path / "r.json", {"scene": [0.4, []], "dynamic_degree": [0.5, []]}), tmp_path / "s.json"
    main(["score", str(results), "--partial", "--json", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| VBench, text to video | this (partial) |"
    assert lines[2].startswith("| total | 4")
    told = json.loads(out.read_text())
    assert told["partial"] is True
    assert told["missing"] == [name for name in T2V.names if name not in ("scene", "dynamic_degree")]
    whole = write(tmp_path / "w.json", {name: [0.5, []] for name in T2V.names})
    main(["score", str(whole), "--partial"])  # nothing is missing
    assert "partial" not in capsys.readouterr().out


def test_what_is_known_of_the_leaderboards_rows():
    """Some dimensions of rows that were published as totals."""
    rows = published(T2V)
    assert rows["Wan2.1-14B (leaderboard)"]["dynamic_degree"] == 65.46
    known = [name for name in T2V.names if name in rows["Wan2.1-14B (own team) (leaderboard)"]]
    assert known == ["dynamic_degree", "multiple_objects", "human_action", "scene", "appearance_style"]
