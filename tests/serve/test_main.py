"""The command: what it refuses before anything is loaded, and how it ends."""

import io
import re
import signal
import socket
import subprocess
import sys
import threading

import av
import pytest

from rcm_jax.serve.__main__ import main
from rcm_jax.serve.client import open_stream
from tests.serve.browser import Viewer, chromium
from tests.test_entry_points import fails
from tests.wan.tiny import write_tiny_vae, write_wan


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port 70000", "--port=70000 must be"),
        ("--host nowhere.invalid", "--host=nowhere.invalid and --port=0 cannot be listened at"),
        ("--token short", "--token must have at least 8 characters"),
        ("--dit_path toy", "the file does not say its chunk pattern: give --first_chunk_t and --chunk_t"),
        ("--dit_path nowhere.safetensors", "no model file at nowhere.safetensors"),
        ("--cache_policy sliding_window --window 3", "--window is of the cache as it was trained"),
        ("--cache_policy rolling_sink --f_limit 3", "--f_limit is for --cache_policy infinity_rope"),
        ("--cache_policy memrope --kv_dtype_k int4", "--cache_policy=MemRope does not keep chunks as they came"),
        ("--num_steps 9", "9 steps must be 1..4"),
        ("--guidance_scale 3", "--guidance_scale is for an ODE"),
        ("--vae_path x", "--vae_path does not apply: "),
    ],
)
def test_what_does_not_go_together(flags, message):
    fails(main, ["--port", "0", *flags.split()], message)


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fails(main, ["--port", str(port)], f"--port={port} cannot be listened at: Address already in use")


def test_without_an_encoder(monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"h264"})
    fails(main, ["--port", "0"], "this PyAV has no H.264 encoder (libx264)")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    fails(main, ["--port", "0"], "serving needs uvicorn: pip install 'rcm_jax[serve]'")


class Command:
    """The command in a process of its own, ready."""

    def __init__(self, *flags):
        command = [sys.executable, "-m", "rcm_jax.serve", "--port", "0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", self.url)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


@pytest.mark.long
def test_eight_streams_end_whole_when_it_is_told_to_stop():
    read, begun = [[] for _ in range(8)], threading.Barrier(9, timeout=60)

    def follow(out):
        with open_stream(server.url) as stream:
            out.append(stream.next(timeout=60).video)
            begun.wait()
            out += [part.video for part in stream]
            ends.append(stream.why)

    ends = []
    with Command("--streams", "8", "--num_steps", "1") as server:
        threads = [threading.Thread(target=follow, args=(out,)) for out in read]
        for thread in threads:
            thread.start()
        begun.wait()
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert server.process.wait(20) == 0
    assert ends == ["the server stops"] * 8
    for parts in read:
        with av.open(io.BytesIO(b"".join(parts))) as file:
            assert len(list(file.decode(video=0))) == 2 * len(parts) - 1


@pytest.mark.long
@pytest.mark.parametrize("decoder", ["full", pytest.param("tiny", marks=pytest.mark.slow)])
def test_the_page_shows_a_wan_network(tmp_path, decoder):
    folder = write_wan(tmp_path / "wan")
    flags = [
        "--size",
        "64x48",
        "--first_chunk_t",
        "1",
        "--chunk_t",
        "1",
        "--kind",
        "student",
        "--dtype",
        "float32",
        "--num_steps",
        "1",
    ]
    flags += ["--dit_path", str(folder), "--cache_policy", "sliding_window", "--window_blocks", "2"]
    if decoder == "tiny":
        flags += ["--decoder", "tiny", "--tiny_vae_path", str(write_tiny_vae(tmp_path))]
    with Command(*flags) as server, chromium() as browser:
        viewer = Viewer(browser, server.url)
        viewer.plays(1.0)
        shown = "(v => [v.videoWidth, v.videoHeight])(document.getElementById('video'))"
        assert viewer.page.evaluate(shown) == [64, 48]
        viewer.say("it begins to snow")
        viewer.plays(1.0)
        assert viewer.notice == ""
        viewer.close()
        assert viewer.wrong == []
