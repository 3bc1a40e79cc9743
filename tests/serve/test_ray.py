"""Many replicas behind one address: what the command refuses, and two of them on CPUs."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
import uuid
from pathlib import Path

import pytest

from rcm_jax.serve.client import StreamEnded, open_stream
from tests.serve.running import until
from tests.serve.test_server import RED, decoded, status
from tests.test_entry_points import fails

SCRIPT = Path(__file__).parents[2] / "deploy" / "ray_serve.py"
FLAGS = "--replicas 2 --gpus 0 --cpus 0.1 --port 0 --cache_policy sliding_window --window_blocks 3 --num_steps 1"
TOKEN, MARK = "known-to-all-replicas", "RCM_JAX_TEST_CLUSTER"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("ray_serve", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- before Ray is started --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--replicas 0", "--replicas=0 must be at least 1"),
        ("--gpus -1", "--gpus=-1 must be at least 0"),
        ("--token short", "--token must have at least 8 characters"),
        ("--port 70000", "--port=70000 must be"),
    ],
)
def test_wrong_flags_start_nothing(script, monkeypatch, flags, message):
    monkeypatch.setitem(sys.modules, "ray", None)  # if it came to that, the message would be another
    fails(script.main, flags.split(), message)


def test_without_ray(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    fails(script.main, [], "a deployment needs ray: pip install 'rcm_jax[ray]'")


def test_room_for_all_replicas(script):
    asked = script.RayOptions(replicas=3, gpus=2, cpus=0.5)
    asked.check_room({"GPU": 6.0, "CPU": 1.5})
    with pytest.raises(ValueError, match="replicas=3 with gpus=2 each are too many: Ray finds 5 gpus here"):
        asked.check_room({"GPU": 5.0, "CPU": 8.0})
    with pytest.raises(ValueError, match=r"replicas=3 with cpus=0\.5 each are too many: Ray finds 1 cpus here"):
        asked.check_room({"GPU": 8.0, "CPU": 1.0})


# --- two replicas -----------------------------------------------------------------------------------------------------


class Cluster:
    """The command in a process of its own, ready."""

    def __init__(self):
        self.mark = uuid.uuid4().hex
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {MARK: self.mark, "RCM_JAX_TOKEN": TOKEN, "JAX_PLATFORMS": "cpu"}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}  # else one is kept in the home
        environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, *FLAGS.split()], cwd=SCRIPT.parents[1], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.errors: list[str] = []
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True).start()
        lines = iter(self.process.stdout.readline, "")
        self.url = next((line.strip() for line in lines if line.startswith("http")), "")
        assert self.url, "".join(self.errors)
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def replicas(self):
        """Their processes."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = f"{MARK}={self.mark}".encode() in (process / "environ").read_bytes().split(b"\0")
                if ours and (process / "cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                    found.append(int(process.name))
        return found

    def open(self, count):
        return [Watched(self.url, seed) for seed in range(count)]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class Watched:
    """A stream whose parts are kept, and the replica that makes them."""

    def __init__(self, url, seed):
        self.stream, self.parts = open_stream(url, token=TOKEN, prompt=RED, seed=seed), []
        self.replica = self.stream._socket.response.headers["X-Replica"]
        self.read(1)

    def read(self, count):
        for _ in range(count):
            self.parts.append(self.stream.next(60).video)

    def rest(self):
        self.parts += [part.video for part in self.stream]

    def whole(self):
        """Every chunk that came can be seen."""
        return len(decoded(self.parts)) == 2 * len(self.parts) - 1


@pytest.fixture
def cluster():
    pytest.importorskip("ray")
    cluster = Cluster()
    try:
        yield cluster
    finally:
        if cluster.process.poll() is None:
            cluster.stop()


def answer(url):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=20) as got:
        return got.headers["X-Replica"], got.read()


def made_now(url):
    """Streams in all replicas."""
    told = {replica: json.loads(body)["streams"] for replica, body in (answer(f"{url}/health") for _ in range(12))}
    return sum(told.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the replicas' processes in /proc")
def test_two_replicas(cluster):
    url = cluster.url

    # the gate is that of the command: the token of the environment, on every replica, and no foreign pages
    assert "token" not in url
    assert {status(url)[0] for _ in range(6)} == {403}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert status(url, **headers, Host="evil.example")[0] == 403
    assert status(url, **headers, Origin="https://evil.example")[0] == 403
    assert status(f"{url}/health")[0] == 200
    pages = [answer(f"{url}/api") for _ in range(12)]
    assert len({page for _, page in pages}) == 1  # whichever answers
    assert len({replica for replica, _ in pages}) == 2

    # streams go to both, and are whole
    streams = cluster.open(6)
    first = {each.replica for each in streams}
    assert len(first) == 2
    for _ in range(4):
        for each in streams:
            each.read(1)
    assert all(each.whole() for each in streams)
    assert answer(f"{url}/api/video?seconds=2&num_steps=1")[1][4:8] == b"ftyp"

    # who goes, with a word or without, frees a stream
    busy = max(first, key=[each.replica for each in streams].count)
    gone, lost, *_ = (each for each in streams if each.replica == busy)
    gone.stream.close()
    lost.stream._socket.socket.shutdown(socket.SHUT_RDWR)
    until(lambda: made_now(url) == 4)
    streams = [each for each in streams if each not in (gone, lost)]

    # one replica dies: its streams end, the others do not notice, and another takes its place
    running = cluster.replicas()
    assert len(running) == 2
    os.kill(running[0], signal.SIGKILL)
    dead = set()
    for each in streams:
        try:
            each.read(8)
        except StreamEnded:
            dead.add(each.replica)
            assert each.whole()
    assert len(dead) == 1
    for each in streams:
        assert (each.stream.why is None) == (each.replica not in dead)
        if each.replica not in dead:
            each.read(2)

    def again():
        with contextlib.suppress(OSError, StreamEnded):
            each = Watched(url, seed=7)
            each.stream.close()
            return each.replica not in first
        return False

    until(again, seconds=180)
    streams = [each for each in streams if each.replica not in dead] + cluster.open(3)
    assert len({each.replica for each in streams} - dead) == 2

    # a signal: every stream ends whole
    cluster.process.send_signal(signal.SIGTERM)
    for each in streams:
        each.rest()
        assert each.stream.why == "the server stops"
        assert each.whole()
    assert cluster.process.wait(60) == 0
    until(lambda: not cluster.replicas(), seconds=20)
