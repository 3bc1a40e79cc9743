"""Scores of a run and of networks, with what they cost; plots of both."""

import json

import imageio.v3 as iio
import numpy as np
import pytest

import rcm_jax
from rcm_jax.chunks import ChunkPattern
from rcm_jax.pipelines import preview
from rcm_jax.pipelines.plots import Point, draw_quality, plot_quality, plot_training
from rcm_jax.pipelines.scoring import LEGEND, Table, row_passes
from rcm_jax.sampling.sampler import SamplerConfig
from rcm_jax.sampling.schedules import few_step_schedule, ode_schedule
from rcm_jax.worlds import toy
from rcm_jax.worlds.toy.scores import evaluation_prompts

# --- passes ---


@pytest.mark.parametrize(
    ("sampler", "passes"),
    [
        (SamplerConfig("few_step", 4, guidance=5.0), 4),  # a student knows its guidance
        (SamplerConfig("euler", 50, guidance=4.0), 100),
        (SamplerConfig("unipc", 50, guidance=1.0), 50),
    ],
)
def test_passes_of_a_sampler(sampler, passes):
    assert sampler.passes == passes


def test_passes_of_a_causal_schedule():
    """Chunks of 1, 2 and 2 latent frames."""
    spans = ChunkPattern.parse("c1-2").spans(5)
    assert few_step_schedule([1]).passes(spans) == 2  # one step, and one pass for the cache
    assert few_step_schedule([4, 2]).passes(spans) == pytest.approx((1 * 5 + 4 * 3) / 5)
    assert few_step_schedule([4, 2], noisy_context_from=1).passes(spans) == pytest.approx((1 * 5 + 4 * 2) / 5)
    assert ode_schedule(20, guidance=3.0).passes(spans) == 42


@pytest.mark.parametrize(
    ("network", "num_steps", "passes"), [("toy", 50, 100), ("toy", 2, 4), ("toy_causal", 1, 2), ("toy_causal", 4, 5)]
)
def test_passes_of_the_networks_that_ship(network, num_steps, passes):
    assert row_passes(rcm_jax.load(network), num_steps=num_steps) == passes


# --- the table ---


@pytest.fixture(scope="module")
def table():
    prompts = evaluation_prompts(1, captions=12)
    videos = toy.batch(3, range(12), prompts)[0]
    table = Table()
    table.add("data", [videos], prompts)
    table.add("student 4", [videos, videos], prompts, passes=4)
    table.add("causal 2", [videos], prompts, passes=3.4)
    return table


def test_the_table_tells_passes_and_explains_every_column(table, tmp_path):
    lines = str(table).splitlines()
    assert lines[0].split()[:2] == ["passes", "all"]
    assert [line.split("  ")[0] for line in lines[2:5]] == ["data", "student 4", "causal 2"]
    assert [line[len("student 4") :].split()[0] for line in lines[2:5]] == ["-", "4", "3.4"]
    legend = "\n".join(lines[5:])
    for column in ("passes", *LEGEND):
        assert column.replace("_", " ") in lines[0]
        assert f"\n{column.replace('_', ' ')}  " in legend
    table.write(tmp_path / "scores.json")
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["passes"] == {"student 4": 4, "causal 2": 3.4}
    assert written["rows"]["student 4"]["all"]["value"] == 1
    assert written["all_of_each"] == {"student 4": [1, 1]}


# --- scores of a run ---


@pytest.fixture
def sampled(monkeypatch):
    """The world's own videos in place of the network's; half of them under wrong prompts in one step."""
    made = []

    def sample_row(pipe, prompts, seeds, *, num_steps, label):
        made.append((seeds, num_steps))
        shown = prompts if num_steps > 1 else prompts[:24] + prompts[:24][::-1]
        return toy.batch(3, range(48), shown)[0]

    monkeypatch.setattr(preview, "sample_row", sample_row)
    monkeypatch.setattr(preview, "Pipeline", type("Fake", (), {"of": staticmethod(lambda params, info: None)}))
    return made


def test_previews_are_scored_and_a_resumed_run_replaces_its_own(sampled, tmp_path):
    for step in (0, 10, 20, 10):
        preview.score_preview(step, None, None, tmp_path, seed=7)
    records = preview.read_previews(tmp_path)
    assert [(r["step"], r["num_steps"]) for r in records] == [(0, 4), (0, 1), (10, 4), (10, 1)]
    assert records[0]["all"]["value"] == 1
    assert records[1]["all"]["value"] == 0.5
    assert sampled[:2] == [([7], 4), ([7], 1)]


# --- plots ---


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


def test_training_is_plotted_from_what_moves(sampled, tmp_path):
    losses = {"loss_consistency": 99.6, "tangent_norm": 3.0}
    records = [{"step": step, "kind": "student", **losses} for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    preview.score_preview(4, None, None, tmp_path)
    short = iio.imread(plot_training(tmp_path, tmp_path / "short.png"))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss_dmd": 0.2}) + "\n" + json.dumps({"step": 6, "loss_critic": 0.1}) + "\n")
    long = iio.imread(plot_training(tmp_path, tmp_path / "long.png"))
    assert (short.shape[1], long.shape[1]) == (864, 1728)  # a panel for each loss that moves, and one for scores


CURVES = {
    "teacher": [
        Point("teacher, 50 steps", 100, interval(0.84, 0.79, 0.89)),
        Point("4 steps", 8, interval(0.83, 0.78, 0.88)),
        Point("2 steps", 4, interval(0.67, 0.6, 0.73)),
    ],
    "student": [
        Point("student, 4 steps", 4, interval(0.91, 0.86, 0.95)),
        Point("2 steps", 2, interval(0.74, 0.68, 0.8)),
        Point("1 step", 1, interval(0.61, 0.54, 0.68)),
    ],
}


def test_quality_is_drawn_against_passes():
    figure = draw_quality(CURVES, 0.99)
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    assert axis.get_xticks().tolist() == [1, 2, 4, 8, 100]
    lines = [line.get_xydata() for line in axis.lines if line.get_linestyle() == "-" and len(line.get_xydata()) == 3]
    for line, points in zip(lines, CURVES.values(), strict=True):
        np.testing.assert_allclose(line[:, 0], [point.passes for point in points], rtol=0.03)
        np.testing.assert_array_equal(line[:, 1], [point.score["value"] for point in points])
    bars = [collection.get_segments() for collection in axis.collections]
    assert [[bar[:, 1].tolist() for bar in one] for one in bars] == [
        [pytest.approx([p.score["low"], p.score["high"]]) for p in points] for points in CURVES.values()
    ]


def test_labels_neither_overlap_nor_leave_the_picture(tmp_path):
    """Also in the file, which the same figure makes."""
    figure = draw_quality(CURVES, 0.99)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 7
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
    assert iio.imread(plot_quality(CURVES, 0.99, tmp_path / "quality.png")).shape[:2] == (756, 1260)
