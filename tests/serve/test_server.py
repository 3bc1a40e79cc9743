"""A server as its readers know it: what comes, what is refused, and that one reader's troubles are no other's."""

import contextlib
import io
import json
import threading
import urllib.error
import urllib.request

import av
import jax.numpy as jnp
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import rcm_jax
from rcm_jax.serve import wire
from rcm_jax.serve.client import Refused, StreamEnded, open_stream
from rcm_jax.worlds.painted import Painted
from tests.serve.running import OPTIONS, running, served, until

RED, BLUE = "a red circle moving left", "a blue square moving up"


@pytest.fixture(scope="module")
def engine():
    with running() as server:
        yield server.engine


@pytest.fixture
def server(engine):
    with served(engine) as server:
        yield server


def decoded(parts):
    file = av.open(io.BytesIO(b"".join(parts)))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def go_on(stream, chunks=100, timeout=20):
    """Reads so many chunks, or to the end."""
    for _ in range(chunks):
        if stream.next(timeout) is None and stream.why is not None:
            return


def get(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read()


def status(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# --- what comes -----------------------------------------------------------------------------------------------------


def test_a_stream_is_the_pipelines(server):
    with open_stream(server.url, prompt=RED, seed=3) as stream:
        parts = [stream.next() for _ in range(4)]
    frames = decoded(part.video for part in parts)
    asked = OPTIONS | dict(seed=3, num_frames=7)
    want = np.concatenate(list(server.engine.pipe.stream(RED, **asked)), axis=1)[0]
    want = want.repeat(8, axis=1).repeat(8, axis=2)
    assert frames.shape == want.shape
    assert np.abs(frames.astype(int) - want).mean() < 6  # it is compressed, and its colours are half as fine
    assert [part.index for part in parts] == [0, 1, 2, 3]
    assert [part.start for part in parts] == [0, 0.125, 0.375, 0.625]
    assert stream.opened["mime"].startswith("video/mp4")
    assert (stream.opened["width"], stream.opened["height"], stream.opened["fps"]) == (192, 192, 8)
    assert stream.opened["seed"] == 3


def colour(part, first):
    """Of the shape: the mean over its frames of what is farthest from white."""
    frames = decoded([first.video, part.video])[-1]
    return frames.reshape(-1, 3)[frames.min(axis=-1).argmin()]


def test_a_prompt_changes_on_the_way(server):
    with open_stream(server.url, prompt=RED, more=1) as stream:
        first = stream.next()
        for _ in range(3):
            red = stream.next()
        stream.say(BLUE)
        prompts = [stream.next().prompt for _ in range(3)]
    assert red.prompt == RED
    assert prompts[-1] == BLUE
    assert prompts[0] in (RED, BLUE)  # one may have been on its way
    assert stream.said[0]["prompt"] == BLUE
    assert stream.said[0]["chunk"] <= 5
    assert first.index == 0


def test_settings_change_and_what_cannot_be_is_refused(server):
    with open_stream(server.url, prompt=RED) as stream:
        stream.next()
        stream.change(seed=9)
        until(lambda: stream.next() and stream.said)
        assert stream.said[0]["settings"]["seed"] == 9
        for wrong, why in (
            (lambda: stream.change(cache_policy="everything"), "cache_policy=everything must be one of"),
            (lambda: stream.say("a purple haze"), "unknown words"),
            (lambda: stream.say("red " * 400), "a prompt of 1600 characters; at most 1000"),
            (lambda: stream.change(num_steps=9), "9 steps must be"),
        ):
            wrong()
            with pytest.raises(Refused, match=why):
                go_on(stream)
        assert stream.next() is not None  # it goes on


def test_a_pause_is_one(server):
    with open_stream(server.url, prompt=RED) as stream:
        stream.next()
        stream.pause()
        with pytest.raises(TimeoutError):
            go_on(stream, timeout=0.5)
        stream.pause(False)
        assert stream.next() is not None


def test_input_video_is_repainted(server):
    video = np.full((24, 24, 3), 255, np.uint8)
    video[8:16, 8:16] = (255, 0, 0)
    with open_stream(server.url, prompt=BLUE, video=True, noise_scale=0.5) as stream:
        parts = []
        while len(parts) < 3:
            if (part := stream.next(timeout=60)) is not None:
                parts.append(part)
            for _ in range(stream.wanted):
                stream.push(video)
        until(lambda: stream.wanted or (go_on(stream, 1) or stream.wanted))
        stream.push(b"no picture")
        with pytest.raises(Refused, match="must be a JPEG, PNG or WebP"):
            go_on(stream)
        stream.pause()
        for _ in range(3):  # one more than the next chunk takes
            stream.push(video)
        with pytest.raises(Refused, match="a frame that was not wanted"):
            go_on(stream)
        stream.pause(False)
        until(lambda: stream.next(timeout=20))
        stream.end_input()
        while stream.why is None:
            stream.next(timeout=20)
        assert stream.why == "there are no more chunks"
    assert [part.seconds for part in parts] == [0.125, 0.25, 0.25]


def test_over_http(server):
    code, text = status(f"{server.url}/api/video?prompt=a+purple+haze")
    assert (code, "unknown words" in text) == (400, True)
    assert status(f"{server.url}/api/video?seconds=-1") == (400, "seconds must be a number above 0, not '-1'\n")
    assert status(f"{server.url}/api/video?colour=red")[0] == 400
    assert "seed must be a whole number or null, not 'x'" in status(f"{server.url}/api/video?seed=x")[1]
    assert decoded([get(f"{server.url}/api/video?seconds=1&prompt=a+blue+square+moving+up")]).shape == (9, 192, 192, 3)
    until(lambda: not server.shows)


def test_what_it_says_of_itself(server):
    about = json.loads(get(f"{server.url}/api"))
    assert set(about["WebSocket /api/stream"]["you say"]) == set(wire.WORDS)
    assert about["size"] == [24, 24]
    assert about["settings"]["cache_policy"] == "sliding_window"
    assert json.loads(get(f"{server.url}/health"))["well"] is True
    with open_stream(server.url) as stream:
        stream.next()
        text = get(f"{server.url}/metrics").decode()
    assert "rcm_jax_streams 1.0" in text
    assert "rcm_jax_first_chunk_seconds_count" in text
    page = get(server.url).decode()
    for name in ("live.js", "live.css"):
        assert f"static/{name}" in page
        assert get(f"{server.url}/static/{name}")
    assert status(f"{server.url}/static/../app.py")[0] == 404


# --- more readers than streams ----------------------------------------------------------------------------------------


def test_readers_wait_for_their_turn(engine):
    with served(engine, streams=1, queue=1) as server, open_stream(server.url, prompt=RED) as first:
        first.next()
        with open_stream(server.url, prompt=BLUE) as second:
            with pytest.raises(TimeoutError):
                second.next(timeout=0.3)
            assert second.place == 0
            with open_stream(server.url) as third, pytest.raises(StreamEnded, match="1 readers wait"):
                third.next(timeout=10)
            assert status(f"{server.url}/api/video")[0] == 503
            first.close()
            assert second.next(timeout=20).prompt == BLUE
            assert second.place is None


def test_a_reader_that_vanishes_leaves_its_place(engine):
    with served(engine, streams=1) as server:
        with connect(server.socket) as gone:
            gone.send(wire.written(wire.Open(prompt=RED, more=8)))
            gone.recv()
            caches = until(lambda: server.shows and server.shows[0].live)._course
            gone.socket.close()  # without a word, in the middle of a chunk
        with open_stream(server.url, prompt=BLUE) as stream:
            assert stream.next(timeout=20).prompt == BLUE
        assert caches.caches[0].k.is_deleted()


def test_streams_beside_each_other_do_not_mix(engine):
    got = {}

    def read(i, prompt):
        with open_stream(server.url, prompt=prompt, seed=i) as stream:
            got[i] = decoded(stream.next(timeout=60).video for _ in range(6))

    with served(engine, streams=6) as server:
        prompts = [RED, BLUE] * 3
        threads = [threading.Thread(target=read, args=(i, prompt)) for i, prompt in enumerate(prompts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        with open_stream(server.url, prompt=RED, seed=4) as stream:
            alone = decoded(stream.next().video for _ in range(6))
    assert len(got) == 6
    np.testing.assert_allclose(got[4].astype(int), alone, atol=2)


def test_a_slow_reader_is_held_back(server):
    with connect(server.socket, max_queue=1, close_timeout=0.2) as slow:
        slow.send(wire.written(wire.Open(prompt=RED, more=3)))
        show = until(lambda: server.shows)[0]
        until(lambda: show.encoded == 3)
        with open_stream(server.url, prompt=BLUE) as quick:
            go_on(quick, 10)
        assert (show.made, show.encoded) == (3, 3)  # nobody asked for more, so there is nothing to be kept


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_garbage_is_refused_and_then_sent_away(server):
    with open_stream(server.url, prompt=BLUE) as other:
        other.next()
        with connect(server.socket) as socket:
            for i in range(25):
                with contextlib.suppress(ConnectionClosed):
                    socket.send(b"\x00\xff" * 100 if i % 2 else '{"type": "sing"}')
            heard = set()
            with contextlib.suppress(ConnectionClosed):
                while True:
                    heard.add(json.loads(socket.recv(10))["type"])
            assert heard == {"refused", "end"}
            assert socket.close_code == 1008
        assert other.next() is not None


def test_a_prompt_of_ten_megabytes(server):
    with open_stream(server.url, prompt=BLUE) as other, connect(server.socket) as socket:
        other.next()
        with contextlib.suppress(ConnectionClosed):
            socket.send(json.dumps({"type": "open", "prompt": "x" * 10_000_000}))
        with pytest.raises(ConnectionClosed):
            socket.recv(10)
        assert socket.close_code == 1009
        assert other.next() is not None


def test_two_hundred_connections_at_once(engine):
    """One has the stream, four wait, all others are told at once that they cannot."""
    answers, leave = [], threading.Event()

    def come():
        try:
            with connect(server.socket, open_timeout=30) as socket:
                socket.send(wire.written(wire.Open()))
                said = json.loads(socket.recv(30))
                answers.append(said["type"])
                leave.wait(60)
        except InvalidStatus as error:
            answers.append(error.response.status_code)

    with served(engine, streams=1, queue=4, connections=16) as server, open_stream(server.url, prompt=RED) as first:
        first.next()
        threads = [threading.Thread(target=come) for _ in range(200)]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) == 200, 60)
        assert answers.count("waiting") == 4
        assert set(answers) <= {"waiting", "end", 403}
        assert first.next() is not None
        assert len(server.shows) == 1
        leave.set()
        for thread in threads:
            thread.join(20)


def test_a_nan_ends_its_own_stream_alone(server):
    with open_stream(server.url, prompt=RED) as bad, open_stream(server.url, prompt=BLUE) as good:
        bad.next()
        good.next()
        live = next(show.live for show in server.shows if show.live.prompt == RED)
        live._decode = lambda x, state: (Painted(jnp.zeros((1, 2, 24, 24, 3), jnp.uint8), jnp.array([7])), state)
        with pytest.raises(StreamEnded, match="frames of chunk .*: 7 of .* numbers are NaN"):
            go_on(bad)
        go_on(good, 5)
        assert good.why is None


def test_a_broken_decoder_is_told_without_its_insides(server):
    with open_stream(server.url, prompt=RED) as stream:
        stream.next()

        def broken(*_):
            raise RuntimeError("secret path")

        server.shows[0].live._decode = broken
        with pytest.raises(StreamEnded, match=r"^something went wrong \(RuntimeError\)$"):
            go_on(stream)


def test_what_cannot_be_opened_is_told(server):
    for wrong, why in ((dict(num_steps=12), "12 steps must be"), (dict(prompt="a purple haze"), "unknown words")):
        with open_stream(server.url, **wrong) as stream, pytest.raises(StreamEnded, match=why):
            stream.next(timeout=30)
    with connect(server.socket) as socket:
        socket.send(wire.written(wire.Say(prompt=RED)))
        assert "the first word must be open" in socket.recv(10)


def test_limits_of_a_stream(engine):
    with served(engine, max_seconds=1.0, idle_seconds=1.0) as server:
        with open_stream(server.url, prompt=RED) as stream:
            parts = list(stream)
            assert parts[-1].start + parts[-1].seconds == pytest.approx(1.125)
            assert stream.why == "a stream lasts 1 seconds at most"
        with open_stream(server.url, prompt=RED) as idle:
            idle.next()
            idle.pause()
            assert "nothing was heard for 1 seconds" in until(lambda: idle.next() is None and idle.why)


def test_strangers_are_not_heard(engine):
    with served(engine, token="a-good-token") as server:
        assert status(server.url)[0] == 403
        assert status(f"{server.url}/health")[0] == 200
        for headers in ({}, {"Authorization": "Bearer a-wrong-token"}):
            with pytest.raises(InvalidStatus, match="403"), connect(server.socket, additional_headers=headers):
                pass
        with pytest.raises(InvalidStatus, match="403"):
            connect(f"{server.socket}?token=a-good-token", origin="https://evil.example").__enter__()
        for given in (dict(url=server.url, token="a-good-token"), dict(url=f"{server.url}/?token=a-good-token")):
            with open_stream(**given) as stream:
                assert stream.next() is not None


def test_a_drained_server_has_ended_every_stream(engine):
    pipe = rcm_jax.load("toy_causal")
    with running(pipe) as server:
        streams = [open_stream(server.url, prompt=RED, seed=i) for i in range(3)]
        parts = [[stream.next().video] for stream in streams]
        server.served.draining = True
        assert status(f"{server.url}/health")[0] == 503
        server.engine.stop(10)
        for stream, part in zip(streams, parts, strict=True):
            part += [more.video for more in stream]
            assert stream.why == "the server stops"
            assert len(decoded(part)) == 2 * len(part) - 1  # whole chunks
            stream.close()
        with open_stream(server.url) as late:
            assert list(late) == []
