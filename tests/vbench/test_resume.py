"""A folder has videos of one making: the same goes on however it is asked for, another is refused and named."""

import json
import os
import shutil
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from rcm_jax.model_file import ModelInfo, save_model
from rcm_jax.outputs import unfinished
from rcm_jax.vbench import sampling
from rcm_jax.vbench.__main__ import main
from rcm_jax.vbench.record import keep_record
from rcm_jax.wan.networks import init_params
from tests.convert.tiny import save
from tests.tiny import MODEL
from tests.wan.tiny import I2V, write_wan

RED, BLUE = "a red circle moving left", "a blue square moving up"
LIST = [
    {"prompt": "red", "dimensions": ["color"], "augmented_prompt": RED},
    {"prompt": "blue", "dimensions": ["color"], "augmented_prompt": BLUE},
]
INFO = ModelInfo(MODEL, "student", "toy", (4, 6, 6), 80.0, 3.0)
CAUSAL = ModelInfo(MODEL, "student", "toy", (5, 6, 6), 1600.0, causal={"pattern": "c1-2", "steps_per_chunk": [1]})


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """The jobs of which a file is written, in place of sampling: groups as they would be sampled."""
    groups = []

    def write(pipe, group, options):
        groups.append(
            [(told["seed"], [job.path.name for job in jobs]) for jobs, told in sampling._calls(group, options)]
        )
        for job in group:
            yield job.path.write_bytes(b"a video")

    monkeypatch.setattr(sampling, "_sampled", write)
    monkeypatch.setattr(sampling, "_streamed", write)
    return groups


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """s.safetensors, causal.safetensors and a LoRA file of a layer."""
    folder, rng = tmp_path_factory.mktemp("networks"), np.random.default_rng(0)
    params = init_params(MODEL, jax.random.key(0))
    save_model(folder / "s.safetensors", params, INFO)
    save_model(folder / "causal.safetensors", params, CAUSAL)
    halves = {"up": rng.normal(size=(MODEL.dim, 2)), "down": rng.normal(size=(2, MODEL.dim))}
    arrays = {f"blocks.0.self_attn.v.lora_{half}.weight": x.astype(np.float32) for half, x in halves.items()}
    save(folder / "lora.safetensors", arrays)
    return folder


@pytest.fixture
def here(tmp_path, networks, monkeypatch):
    """A folder with the networks and the list, where commands run."""
    for file in networks.iterdir():
        shutil.copy2(file, tmp_path)
    (tmp_path / "list.json").write_text(json.dumps(LIST))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample(*flags, prompts="list.json", samples=1):
    main(["sample", "--prompts", prompts, "--out", "out", "--samples", str(samples), *map(str, flags)])


def refused(*flags, prompts="list.json"):
    with pytest.raises(SystemExit) as stopped:
        sample(*flags, prompts=prompts)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


NETWORK, STREAMED = ("--dit_path", "s.safetensors"), ("--dit_path", "causal.safetensors")
GOES_ON = [
    (NETWORK, ("--dit_path", "./s.safetensors")),
    (NETWORK, (*NETWORK, "--seed", 0)),
    (NETWORK, (*NETWORK, "--num_steps", 4)),
    ((*NETWORK, "--kind", "student"), NETWORK),
    ((*NETWORK, "--lora", "lora.safetensors"), (*NETWORK, "--lora", "./lora.safetensors:1.0")),
    (STREAMED, (*STREAMED, "--chunk_t", 2, "--window", 0)),
    ((*NETWORK, "--together", 1), NETWORK),
]  # fmt: skip


@pytest.mark.parametrize(("first", "then"), GOES_ON, ids=lambda flags: " ".join(map(str, flags)))
def test_the_same_goes_on(here, capsys, first, then):
    sample(*first)
    sample(*then, samples=2)
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 videos made, 4 there")


OTHERS = [
    (NETWORK, (*NETWORK, "--num_steps", 2), "sampling.num_steps=4, not 2"),
    (NETWORK, (*NETWORK, "--seed", 1), "seed=0, not 1"),
    (NETWORK, (*NETWORK, "--noise_pattern", "c2-2"), "noise_pattern=None, not c2-2"),
    (NETWORK, (*NETWORK, "--kind", "teacher"), "kind=student, not teacher"),
    (NETWORK, (*NETWORK, "--lora", "lora.safetensors"), "files.lora=[], not [{"),
    ((*NETWORK, "--lora", "lora.safetensors"), (*NETWORK, "--lora", "lora.safetensors:0.5"), "files.lora=[{"),
    (NETWORK, (*NETWORK, "--text", "original"), "text=augmented, not original"),
    (NETWORK, ("--dit_path", "toy"), "files.network"),
    (STREAMED, (*STREAMED, "--chunk_t", 1), "causal.pattern=c1-2, not c1-1"),
    (STREAMED, (*STREAMED, "--window", 2), "causal.window=0, not 2"),
    (STREAMED, (*STREAMED, "--cache_policy", "rolling_sink"),
     "cache_policy=None, not {'name': 'RollingSink'"),
    (STREAMED, (*STREAMED, "--kv_dtype_k", "int8"),
     "cache_quant.keys.dtype=bf16, not int8"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "then", "why"), OTHERS, ids=[why for *_, why in OTHERS])
def test_another_is_refused(here, first, then, why):
    sample(*first)
    told = refused(*then)
    assert told.startswith("error: out has videos made with ")
    assert why in told
    assert told.endswith("give another folder")


def test_an_overwritten_network(here):
    sample(*NETWORK)
    state = os.stat("s.safetensors")
    os.utime("s.safetensors", (state.st_atime, state.st_mtime + 2))
    assert "files.network.modified=" in refused(*NETWORK)


def test_another_text_of_a_prompt(here):
    sample(*NETWORK)
    other = [LIST[1], LIST[0] | {"augmented_prompt": BLUE}]
    for name, entries in (("other.json", other), ("turned.json", LIST[::-1])):
        (here / name).write_text(json.dumps(entries))
    assert "made with texts=" in refused(*NETWORK, prompts="other.json")
    sample(*NETWORK, prompts="turned.json")  # another order is none


def test_another_image_under_the_same_name(here, made):
    """And videos of several images are one group, for which the network is read once."""
    folder = write_wan(here / "wan", I2V)
    (here / "p").mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (48, 32), colour).save(here / "p" / f"{colour}.png")
    entries = [
        {"prompt_en": f"a {c} fox", "dimension": "i2v_subject", "image_name": f"{c}.png"} for c in ("red", "blue")
    ]
    (here / "i2v.json").write_text(json.dumps(entries))
    flags = ("--dit_path", folder, "--kind", "teacher", "--images", "p", "--size", "48x32", "--num_frames", 5)
    sample(*flags, prompts="i2v.json", samples=2)
    (group,) = made
    assert group == [(i, [f"a {c} fox-{i}.mp4"]) for i in (0, 1) for c in ("red", "blue")]
    Image.new("RGB", (48, 32), "green").save(here / "p" / "red.png")
    assert "made with images=" in refused(*flags, prompts="i2v.json")


@pytest.mark.parametrize("record", ["[]", "{", "", '{"network": "toy"}', '{"format": "rcm_jax.vbench/1"}'])
def test_a_record_that_is_none(here, record):
    sample(*NETWORK)
    (here / "out" / "sampling.json").write_text(record)
    assert f"out{os.sep}sampling.json " in refused(*NETWORK)


def test_videos_that_nobody_told_of(here):
    sample(*NETWORK)
    (here / "out" / "sampling.json").unlink()
    assert "out has videos of these names and no sampling.json" in refused(*NETWORK)


def test_an_empty_file_is_no_video(here, capsys):
    sample(*NETWORK)
    (here / "out" / "red-0.mp4").write_bytes(b"")
    sample(*NETWORK)
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 videos made, 2 there")
    assert (here / "out" / "red-0.mp4").stat().st_size > 0


def test_a_folder_in_the_way(here):
    (here / "out" / "red-0.mp4").mkdir(parents=True)
    assert f"out{os.sep}red-0.mp4 is a folder where a video is to be" in refused(*NETWORK)


def test_nothing_is_written_of_what_is_refused(here):
    refused(*NETWORK, "--num_steps", 9)
    refused(*NETWORK, "--num_frames", 5)
    assert "times for 7 chunks" in refused(*STREAMED, "--steps_per_chunk", *"1111111")
    assert "must be a multiple of --fsdp=2" in refused(*NETWORK, "--fsdp", 2, "--batch_size", 3)
    refused(*NETWORK, "--seed", 2**32 - 1, "--samples", 2)
    assert not (here / "out").exists()


def test_two_that_begin_together(tmp_path):
    """With different settings one of them is told so, and nobody sees half a record."""
    barrier, told = threading.Barrier(8), []

    def begin(number):
        barrier.wait()
        try:
            keep_record(tmp_path / "out", {"seed": number}, begun=False)
        except ValueError as error:
            told.append(str(error))

    threads = [threading.Thread(target=begin, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 7
    assert all("has videos made with seed=" in words and "no videos yet" in words for words in told)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sampling.json"]


def test_two_that_end_together(tmp_path):
    """Each writes under a name of its own."""
    path = tmp_path / "vbench_info.json"
    with unfinished(path, shared=True) as one, unfinished(path, shared=True) as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["vbench_info.json"]
