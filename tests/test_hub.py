"""Networks from a hub: found, fetched as far as they are needed, kept; and one line for all that goes wrong."""

import errno
import os
import subprocess
import sys

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest

import rcm_jax
from rcm_jax import evaluate, hub, sample
from rcm_jax.convert import commands
from rcm_jax.errors import ArgumentError
from rcm_jax.model_file import load_model
from rcm_jax.training.config import RunConfig
from rcm_jax.training.runs import train_recipe
from rcm_jax.worlds.builtin import BUILTIN
from tests.hub import COMMIT, serving
from tests.test_entry_points import fails
from tests.tiny import MODEL
from tests.wan.tiny import NAMES, write_wan

ASKED = dict(size="32x48", num_frames=5, num_steps=2, seed=3)
SMALL = ["--size", "32x48", "--num_frames", "5", "--kind", "student", "--num_steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def server(folder):
    with serving() as running:
        running.repositories["tiny/wan"] = folder
        running.refused |= {
            "tiny/gated": (403, "GatedRepo"), "tiny/locked": (403, ""), "tiny/down": (500, ""),
            "tiny/none": (401, "RepoNotFound"),
        }  # fmt: skip
        yield running


@pytest.fixture
def cache(server, tmp_path, monkeypatch):
    """An empty cache, and huggingface_hub as HF_ENDPOINT and HF_HOME would set it at its import."""
    constants = huggingface_hub.constants
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    hub._ask.cache_clear()
    server.asked.clear()
    yield tmp_path / "cache"
    hub._ask.cache_clear()


@pytest.fixture
def offline(cache, monkeypatch):
    def switch():
        hub._ask.cache_clear()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    return switch


def test_a_published_folder_is_sampled_like_a_local_one_and_then_offline(server, cache, folder, offline):
    want = rcm_jax.load(str(folder), kind="student")("a red fox", **ASKED)[0].frames
    pipe = rcm_jax.load("tiny/wan", kind="student")
    assert server.sent(NAMES["dit"]) <= 100_001  # its header: weights are fetched when they are read
    np.testing.assert_array_equal(pipe("a red fox", **ASKED)[0].frames, want)
    assert server.sent(NAMES["dit"]) >= (folder / NAMES["dit"]).stat().st_size
    offline()
    server.asked.clear()
    np.testing.assert_array_equal(rcm_jax.load("tiny/wan", kind="student")("a red fox", **ASKED)[0].frames, want)
    assert not server.asked


@pytest.mark.long
def test_the_environment_of_huggingface_hub_is_obeyed(server, tmp_path):
    """HF_ENDPOINT and HF_HOME, which it reads when it is imported; a file, at a revision; nothing else is fetched."""
    code = f"from rcm_jax import hub; print(hub.find('hf://tiny/wan@v1/{NAMES['vae']}').fetch())"
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    for offline in ("0", "1"):
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, capture_output=True, text=True, env=env | {"HF_HUB_OFFLINE": offline}, timeout=120)
        path = tmp_path / "home" / "hub" / "models--tiny--wan" / "snapshots" / COMMIT / NAMES["vae"]
        assert done.stdout.strip() == str(path), done.stderr
    assert [file.name for file in path.parent.iterdir()] == [NAMES["vae"]]


def test_parts_are_found_in_repositories(cache, folder, server):
    """The converted network here, all around it there: named by a repository or by a file."""
    vae, text = "tiny/wan", f"hf://tiny/wan@v1/{NAMES['umt5']}"
    pipe = rcm_jax.load(folder / NAMES["dit"], vae_path=vae, text_encoder_path=text)
    files = pipe.opened.files
    assert str(files.vae.path) == f"hf://tiny/wan/{NAMES['vae']}"
    assert str(files.text.path) == text
    assert files.tokenizer.path.is_relative_to(cache)
    assert server.sent(NAMES["dit"]) == 0


def test_what_is_here_wins(cache, folder, server):
    (cache.parent / "tiny").mkdir()
    (cache.parent / "tiny" / "wan").symlink_to(folder)
    assert rcm_jax.load("tiny/wan").opened.files.dit[0].path.resolve() == folder
    assert not server.asked


def test_converting_from_a_repository(cache, server, capsys):
    source = f"hf://tiny/wan/{NAMES['dit']}"
    commands.main([source, "out.safetensors", "--dry_run"])
    assert "head.head.weight (64, 32) float32 -> head/out/kernel (32, 64) float32" in capsys.readouterr().out
    assert server.sent(NAMES["dit"]) <= 100_001
    fails(commands.main, ["tiny/none", "out.safetensors"], "tiny/none: ", "has no repository tiny/none")
    fails(commands.main, ["merge", source, "o.safetensors", "--lora", "tiny/none"], "--lora=tiny/none: ", "repository")
    commands.main([source, "out.safetensors"])
    load_model("out.safetensors")


def test_our_own_files_are_read_from_a_repository_and_others_not_fetched(cache, server, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "teacher.safetensors").write_bytes(BUILTIN["toy"].read_bytes())
    server.repositories["tiny/ours"] = tmp_path / "ours"
    params, info = load_model("tiny/ours")
    assert (info.kind, info.world) == ("teacher", "toy")
    assert params["head"]
    with pytest.raises(ValueError, match="hf://tiny/wan/.* was not written by rcm_jax"):
        load_model("tiny/wan")
    assert server.sent(NAMES["dit"]) <= 100_001


def test_teachers_and_students_of_other_commands_are_asked_for_first(cache, monkeypatch):
    monkeypatch.setattr("rcm_jax.pipelines.scoring.data_row", lambda *_: pytest.fail("scores"))
    fails(evaluate.main, ["--student", "a=tiny/none"], "--student=tiny/none: ", "has no repository")
    fails(evaluate.main, ["--teacher", "tiny/none"], "--teacher=tiny/none: ", "has no repository")
    with pytest.raises(ArgumentError, match=r"config.teacher=tiny/none: .* has no repository"):
        train_recipe(RunConfig(MODEL, teacher="tiny/none"), cache)


def test_weights_too_large_are_refused_before_anything_is_fetched(cache, server, monkeypatch):
    monkeypatch.setattr("rcm_jax.pipelines.opening.device_limit", lambda: 1 << 10)
    fails(sample.main, ["--dit_path", "tiny/wan"], "the network's weights take 0.0 GiB", "no --fsdp up to 8 is enough")
    assert server.sent(NAMES["vae"]) == server.sent(NAMES["umt5"]) == 0


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("dit_path", "tiny/none", ["there is no such file or folder here", "has no repository tiny/none", "HF_TOKEN"]),
        ("dit_path", "hf://tiny/wan/none.pt", ["tiny/wan has no none.pt", "it has ", NAMES["vae"]]),
        ("dit_path", "hf://tiny/wan@v9", ["no revision 'v9'"]),
        ("dit_path", "hf://tiny/gated", ["is gated", "/tiny/gated", "hf auth login"]),
        ("dit_path", "hf://tiny/locked", ["refuses (403)", "hf auth login", "HF_TOKEN"]),
        ("dit_path", "hf://tiny", ["hf://org/name@revision/file"]),
        ("dit_path", "tiny/a--b", ["is no name of a repository"]),
        ("second_dit_path", "tiny/none", ["has no repository"]),
        ("vae_path", "tiny/none", ["has no repository"]),
        ("text_encoder_path", "hf://tiny/wan/none", ["tiny/wan has no none"]),
        ("tokenizer_path", "tiny/none", ["has no repository"]),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(cache, folder, flag, value, words):
    flags = ["--dit_path", str(folder)] if flag != "dit_path" else []
    fails(sample.main, [*flags, f"--{flag}", value], f"--{flag}={value}: ", *words)
    assert not list(cache.rglob("*.safetensors"))


def test_offline_the_cache_is_told(cache, offline, monkeypatch):
    hub.find(f"hf://tiny/wan/{NAMES['vae']}").fetch()
    offline()
    asked = ["--dit_path", "hf://tiny/wan/x.pt"]
    fails(sample.main, asked, "--dit_path=hf://tiny/wan/x.pt: HF_HUB_OFFLINE is set", "the cache has Wan2.1_VAE.pth")
    fails(sample.main, ["--dit_path", "tiny/new"], "HF_HUB_OFFLINE is set", f"the cache ({cache}) has nothing of it")
    fails(sample.main, ["--dit_path", "hf://tiny/wan/Wan2.1_VAE.pth"], "autoencoder, not a diffusion transformer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    fails(
        sample.main, ["--dit_path", "tiny/new"], "http://127.0.0.1:9 cannot be reached (ConnectError", "nothing of it"
    )


def test_without_the_package(cache, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails(
        sample.main,
        ["--dit_path", "tiny/wan"],
        "--dit_path=tiny/wan",
        "no such file or folder",
        "pip install -e '.[hub]'",
    )
    rcm_jax.load(str(folder))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no room for it in .*cache: HF_HOME moves"),
        (OSError("Consistency check failed: file should be of size 9 but has size 3 (x)."), "the same command again"),
        (PermissionError(errno.EACCES, "denied"), "cannot be written: HF_HOME"),
    ],
)
def test_a_download_that_breaks_off(cache, monkeypatch, error, words):
    place = hub.find(f"hf://tiny/wan/{NAMES['vae']}", "vae_path")

    def breaks(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks)
    with pytest.raises(ArgumentError, match=f"vae_path=hf://tiny/wan/Wan2.1_VAE.pth: .*{words}"):
        place.fetch()


@pytest.mark.parametrize(
    ("written", "revision", "inside"),
    [
        ("hf://tiny/wan", "main", ""),
        ("hf://tiny/wan@v1", "v1", ""),
        ("hf://tiny/wan@v1/google/umt5-xxl/", "v1", "google/umt5-xxl"),
        ("hf://tiny/wan@v%31/config.json", "v1", "config.json"),
    ],
)
def test_addresses(cache, written, revision, inside):
    place = hub.find(written)
    assert (place.repo, place.revision, place.inside) == ("tiny/wan", revision, inside)


def test_what_is_no_name_of_a_repository_stays_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_ask", lambda *_: pytest.fail("asks the hub"))
    for path in ("nowhere", "runs/student.safetensors", "./runs/mine", "/a/b", "a/b/c", tmp_path / "a" / "b"):
        assert not isinstance(hub.find(path), hub.Published)
