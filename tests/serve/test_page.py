"""The page in a real Chromium: it plays, follows what is said, and shares the server with others."""

import av
import numpy as np
import pytest

from rcm_jax.media.video import write_video
from tests.serve.browser import Viewer, chromium
from tests.serve.running import OPTIONS, running, served, until

pytestmark = [pytest.mark.long, pytest.mark.optimised]

RED, BLUE, CHUNK = 0, 2, 0.25  # seconds


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def engine():
    with running(options=OPTIONS | {"num_steps": 4}) as server:
        yield server.engine


@pytest.fixture
def server(engine):
    with served(engine, streams=2) as server:
        yield server


@pytest.fixture
def viewer(browser, server):
    viewer = Viewer(browser, server.url)
    yield viewer
    viewer.close()
    assert viewer.wrong == []


def test_it_plays_at_once_what_the_prompt_says(viewer, server):
    viewer.plays(1.0)
    assert viewer.sees(RED) > 0
    assert viewer.notice == ""
    assert float(viewer.page.inner_text("#first").split()[0]) < 5
    for figure in ("rate", "latency", "memory"):
        assert viewer.page.inner_text(f"#{figure}") != "\u2013"
    assert int(viewer.page.inner_text("#ahead")) <= 2
    assert viewer.page.inner_text("#network").startswith("toy_causal")


def test_another_prompt_is_seen_within_two_chunks(viewer):
    viewer.sees(RED)
    viewer.plays(1.0)
    said = viewer.time
    viewer.say("a blue square moving up")
    seen = viewer.sees(BLUE)
    assert seen - said <= 2 * CHUNK + 1 / 8  # and the frame in which it is noticed
    viewer.say("a purple haze")
    viewer.wait("document.getElementById('notice').textContent.includes('unknown words')")
    viewer.plays()  # as before


def test_settings_change_while_it_plays(viewer, server):
    viewer.plays()
    viewer.page.fill("#seed", "7")
    viewer.page.press("#seed", "Tab")
    until(lambda: server.shows[0].live.settings["seed"] == 7)
    viewer.page.select_option("#num_steps", "1")
    until(lambda: server.shows[0].live.settings["num_steps"] == 1, 60)
    viewer.page.select_option("#cache_policy", "infinity_rope")
    until(lambda: server.shows[0].live.settings["cache_policy"] == "infinity_rope", 60)
    viewer.plays()
    assert viewer.page.input_value("#seed") == "7"


def test_a_pause_costs_nothing(viewer, server):
    viewer.plays()
    viewer.page.click("#pause")
    until(lambda: server.shows[0].paused)
    made, time = server.shows[0].made, viewer.time
    viewer.page.wait_for_timeout(700)
    assert server.shows[0].made <= made + 1
    assert viewer.time < time + 0.1
    viewer.page.click("#pause")
    viewer.plays()


def test_a_recording_is_a_file(viewer, tmp_path):
    viewer.plays(1.5)
    with viewer.page.expect_download() as download:
        viewer.page.click("#save")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.suffix == ".mp4"
    with av.open(path) as file:
        times = [float(frame.pts * frame.time_base) for frame in file.decode(video=0)]
    assert times == [i / 8 for i in range(len(times))]
    assert times[-1] > 1.4


def test_reload_and_back(viewer, server):
    viewer.plays()
    viewer.page.reload()
    viewer.plays()
    until(lambda: len(server.shows) == 1)  # the old stream has ended
    viewer.page.goto(f"{server.url}/api")
    until(lambda: not server.shows)
    viewer.page.go_back()
    viewer.plays()
    assert len(server.shows) == 1


def test_a_second_tab_waits_for_its_turn(browser, engine):
    with served(engine, streams=1) as server:
        first = Viewer(browser, server.url)
        first.plays()
        second = Viewer(browser, server.url)
        second.wait("document.getElementById('notice').textContent.includes('you are next')")
        first.plays()
        assert second.time == 0
        first.close()
        second.plays()
        assert second.notice == ""
        second.close()
        assert first.wrong == second.wrong == []


def test_the_stream_s_end_is_told(viewer, server):
    viewer.plays()
    server.shows[0].closed = True
    server.engine.changed()
    viewer.wait("document.getElementById('notice').textContent === 'the stream has ended: closed'")
    viewer.page.click("#again")
    viewer.plays()


@pytest.mark.slow
def test_a_camera_is_repainted(viewer, server):
    viewer.plays()
    viewer.page.click("summary")
    viewer.page.click("#camera")
    until(lambda: any(show.pushed is not None and show.encoded > 2 for show in server.shows), 60)
    viewer.plays()
    viewer.page.click("#plain")
    until(lambda: server.shows and all(show.pushed is None for show in server.shows))
    viewer.plays()


def test_a_file_is_repainted_to_its_end(viewer, server, tmp_path):
    frames = np.full((24, 48, 64, 3), 255, np.uint8)
    frames[:, 16:32, 24:40] = (255, 0, 0)
    viewer.plays()
    viewer.page.click("summary")
    viewer.page.set_input_files("#file", write_video(tmp_path / "input.mp4", frames, 8))
    until(lambda: any(show.pushed is not None and show.encoded > 2 for show in server.shows), 60)
    viewer.wait("document.getElementById('notice').textContent.includes('there are no more chunks')", 40)


def test_a_phone_shows_all_of_it(browser, server):
    viewer = Viewer(browser, server.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    viewer.plays()
    assert viewer.page.evaluate("document.documentElement.scrollWidth") <= 360
    for button in ("#pause", "#again", "#save"):
        assert viewer.page.locator(button).bounding_box()["height"] >= 40
    viewer.close()
    assert viewer.wrong == []


def test_a_token_goes_with_the_page(browser, engine):
    with served(engine, token="a-good-token") as server:
        viewer = Viewer(browser, f"{server.url}/?token=a-good-token")
        viewer.plays()
        viewer.close()
        assert viewer.wrong == []
