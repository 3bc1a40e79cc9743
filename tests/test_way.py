"""The page's way from a folder of videos to a stream, each command as docs/training.md has it, at tiny size."""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from tests.hosts import environment, finish, free_port
from tests.wan.tiny import CORPUS, DIT, write_wan

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
HEIGHT, WIDTH, FRAMES = 32, 48, 21  # six latent frames of 4 x 6: two chunks of the page's pattern
SIZES = [f"--config.model.{name}={getattr(DIT, name)}" for name in
         ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim")]  # fmt: skip
SHORT = [
    "--config.steps=2", "--config.log_every=1", "--config.data.batch_size=2", "--config.microbatches=1",
    "--config.mesh.sequence=1", "--config.tensorboard=False", "--config.model.remat=none",
    "--config.model.dtype=float32",
]  # fmt: skip
BOTH_STEPS = ["--config.method.student_update_freq=2"]  # of two steps one is the student's, one the critic's
VIDEO = ["--size", f"{WIDTH}x{HEIGHT}", "--num_frames", str(FRAMES)]
SMALL = {
    "data.prepare videos": [*VIDEO, "--samples_per_shard", "2"],
    "data.prepare prompts": [],
    "data.prepare teacher": [*VIDEO, "--num_steps", "2", "--samples_per_shard", "2"],
    "data.prepare inspect": [],
    "train": [*SIZES, *SHORT],
    "sample_causal": [*VIDEO, "--num_steps", "2"],
    "sample": [*VIDEO, "--num_steps", "2"],
}


def commands(page: str, heading: str) -> list[list[str]]:
    """Words of the indented command lines of one part of the page."""
    part = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)[1]
    return [shlex.split(line) for line in part.splitlines() if line.startswith("    python -m rcm_jax")]


def small(words: list[str]) -> list[str]:
    """The command with what makes it tiny."""
    module = words[2].removeprefix("rcm_jax.")
    name = f"{module} {words[3]}" if module == "data.prepare" else module
    extra = SMALL[name]
    if name == "train":
        frames = (FRAMES - 1) // 4 + 1
        frames = frames if "causal" in " ".join(words) else frames - 1  # the bidirectional recipe's videos are shorter
        extra = [*extra, f"--config.data.latent_shape=({frames}, {HEIGHT // 8}, {WIDTH // 8})"]
        extra += BOTH_STEPS if "sf_dmd" in " ".join(words) else []
    return [sys.executable, *words[1:], *extra]


LINES = commands(PAGE.read_text(), "The way")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the page starts from: Wan's files, videos with captions, prompts."""
    folder = tmp_path_factory.mktemp("way")
    write_wan(folder / "wan")
    clips = folder / "clips"
    clips.mkdir()
    rng = np.random.default_rng(0)
    for i, caption in enumerate(CORPUS[:4]):
        still = rng.integers(0, 255, (HEIGHT + 24, WIDTH + 24, 3), np.uint8).repeat(2, 0).repeat(2, 1)
        frames = [still[t : t + 2 * HEIGHT, t : t + 2 * WIDTH] for t in range(24)]
        iio.imwrite(clips / f"{i}.mp4", np.stack(frames), plugin="pyav", codec="libx264", fps=16)
        (clips / f"{i}.txt").write_text(caption)
    (folder / "prompts.txt").write_text("\n".join(CORPUS[:2]))
    return folder


def run(folder: Path, words: list[str], hosts: int = 1) -> str:
    """What the command, in one process or in several, prints."""
    port, processes, outs = free_port(), [], [folder / f"said.{i}.txt" for i in range(hosts)]
    for i, out in enumerate(outs):
        own = [f"--config.mesh.fsdp={hosts}"] if "rcm_jax.train" in words else []
        if hosts > 1 and own:
            own += [f"--coordinator=127.0.0.1:{port}", f"--num_hosts={hosts}", f"--host={i}"]
        elif hosts > 1:
            own = ["--process", str(i), "--num_processes", str(hosts)]
        env = environment(1) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        with out.open("w") as file:
            processes.append(subprocess.Popen([*words, *own], cwd=folder, env=env, stdout=file, stderr=file))
    codes = finish(processes, timeout=600)
    said = "\n".join(out.read_text() for out in outs)
    assert not any(codes), f"{' '.join(words)}\n{said[-3000:]}"
    return said


def walk(folder: Path, lines: list[list[str]], hosts: int = 1) -> None:
    for words in lines:
        several = "rcm_jax.train" in words or words[3] in ("videos", "prompts", "teacher")
        run(folder, small(words), hosts if several else 1)


@pytest.fixture
def place(folder, tmp_path):
    place = tmp_path / "way"
    place.mkdir()
    for name in ("wan", "clips", "prompts.txt"):
        (place / name).symlink_to(folder / name)
    return place


def check_stream(place: Path, stages: Sequence[str]) -> None:
    assert iio.imread(place / "fox.mp4", plugin="pyav").shape == (FRAMES, HEIGHT, WIDTH, 3)
    for stage in stages:
        assert len((place / "runs" / stage / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.long
def test_a_folder_of_videos_becomes_a_stream(place):
    causal = LINES[:6]
    walk(place, causal)
    check_stream(place, ("tf", "scm", "sf"))
    assert "nothing is broken" in run(place, small(causal[1]))


@pytest.mark.slow
def test_every_line_of_the_page_in_two_processes(place):
    """The page's other ways too: the bidirectional student, and videos that a teacher painted."""
    walk(place, LINES[:8], hosts=2)
    check_stream(place, ("tf", "scm", "sf", "rcm"))
    (place / "data" / "clips").rename(place / "data" / "filmed")
    walk(place, LINES[8:], hosts=2)
    assert "nothing is broken" in run(place, small(LINES[1]))


def test_the_page_has_the_lines_that_are_run():
    programs = [" ".join(words[2:3] + words[3:4] * (words[2] == "rcm_jax.data.prepare")) for words in LINES]
    prepare = [f"rcm_jax.data.prepare {what}" for what in ("videos", "inspect", "prompts", "teacher")]
    train, streams = ["rcm_jax.train"], ["rcm_jax.sample_causal"]
    assert programs == [*prepare[:2], *train * 3, *streams, *train, "rcm_jax.sample", *prepare[2:]]
