"""LoRA files that are added while a network is loaded give what the network they make gives."""

import warnings

import jax
import numpy as np
import pytest

from rcm_jax import sample
from rcm_jax.convert import commands
from rcm_jax.errors import ArgumentError
from rcm_jax.media.tags import read_tags
from rcm_jax.model_file import ModelInfo, save_model
from rcm_jax.pipelines.pipeline import load
from rcm_jax.wan.networks import init_params
from tests.convert.tiny import save
from tests.tiny import MODEL

INFO = ModelInfo(MODEL, "student", "toy", (4, 6, 6), 80.0, 3.0)
ASKED = dict(prompt="a red circle moving left", num_steps=1, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base.safetensors and two LoRA files of one of its layers."""
    folder, rng = tmp_path_factory.mktemp("loras"), np.random.default_rng(0)
    save_model(folder / "base.safetensors", init_params(MODEL, jax.random.key(0)), INFO)
    for name in ("one", "other"):
        halves = {"up": rng.normal(size=(MODEL.dim, 2)), "down": rng.normal(size=(2, MODEL.dim))}
        arrays = {f"blocks.0.self_attn.v.lora_{half}.weight": x.astype(np.float32) for half, x in halves.items()}
        save(folder / f"{name}.safetensors", arrays)
    return folder


def test_a_sum_that_is_never_written(folder):
    base = str(folder / "base.safetensors")
    loras = [f"{folder}/one.safetensors:0.5", f"{folder}/other.safetensors"]
    commands.main(["merge", base, str(folder / "sum.safetensors"), *(w for text in loras for w in ("--lora", text))])
    plain, merged = (load(path).arrays(**ASKED) for path in (base, folder / "sum.safetensors"))
    added = load(base, lora=loras).arrays(**ASKED)
    np.testing.assert_array_equal(added, merged)
    assert np.abs(added - plain).max() > 0.01


def test_the_command_and_the_file_s_comment(folder, monkeypatch):
    monkeypatch.chdir(folder)
    flags = ["--dit_path", "base.safetensors", "--lora", "one.safetensors:0.5", "--num_steps", "1"]
    sample.main([*flags, "--save_path", "v.gif"])
    about = read_tags(folder / "v.gif")
    assert f"{folder}/one.safetensors:0.5" in about["comment"]
    monkeypatch.chdir(folder.parent)
    sample.main(["--again", str(folder / "v.gif"), "--save_path", str(folder / "w.gif")])
    assert (folder / "w.gif").stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lora=["nowhere.safetensors:0.5"]), "lora=nowhere.safetensors|nowhere.safetensors"),
        (dict(lora_skip="k_img"), "lora_skip needs lora"),
        (dict(second_lora=["one.safetensors"]), "second_lora needs second_dit_path"),
        (dict(lora=["{folder}/one.safetensors"], lora_skip="audio"), "'audio' matches no layer"),
    ],
)
def test_what_cannot_be_added(folder, options, message):
    options = {k: [text.format(folder=folder) for text in v] if isinstance(v, list) else v for k, v in options.items()}
    with pytest.raises((ArgumentError, ValueError, FileNotFoundError), match=message), warnings.catch_warnings():
        load(folder / "base.safetensors", **options)
