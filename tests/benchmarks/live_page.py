"""What a viewer waits for, measured in a browser from the pixels that it shows.

    python -m tests.benchmarks.live_page [--rounds 12] [--json OUT] [--shots FOLDER] [-- FLAGS OF rcm_jax.serve]

The server is started first, and its programs are compiled. Then, in Chromium on the same machine:

first       seconds from the click on `Start anew` to the first frame that is shown
seen        seconds from the click on `Say` to the first frame that is another than it would have been: a hundredth of
            its pixels by more than 24 levels of 255 from the frame at the same time of the same video without a new
            prompt
obeyed      seconds from the click on `Say`, with another colour, to the first frame of that colour
stalls      seconds by which the frames came later than they should have while nothing was asked for
rate        video seconds a second that a reader gets that plays nothing (`rcm_jax.serve.client`)
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from rcm_jax.serve.client import open_stream
from tests.serve.browser import COLOUR, Viewer, chromium
from tests.serve.test_main import Command

BEGINS = "a red circle moving left"
PROMPTS = ("a blue square moving up", 2), ("a green circle moving right", 1)  # and where their colour is in a pixel
SIDE = 24  # of the world's pictures
RECORD = f"""() => {{
  const colour = {COLOUR}, video = document.getElementById("video"), small = document.createElement("canvas");
  small.width = small.height = {SIDE};
  const context = small.getContext("2d", {{ willReadFrequently: true }});
  context.imageSmoothingEnabled = false;
  window.frames_shown = [], window.pictures = [];
  const seen = (now, frame) => {{
    context.drawImage(video, 0, 0, {SIDE}, {SIDE});
    window.pictures.push(Array.from(context.getImageData(0, 0, {SIDE}, {SIDE}).data));
    window.frames_shown.push([performance.now(), frame.mediaTime, colour()]);
    video.requestVideoFrameCallback(seen);
  }};
  video.requestVideoFrameCallback(seen);
}}"""


def shown(viewer: Viewer) -> list:
    return viewer.page.evaluate("window.frames_shown")


def is_colour(pixel: list[int], channel: int) -> bool:
    return pixel is not None and pixel[channel] > 1.4 * max(v for i, v in enumerate(pixel) if i != channel)


def begin(viewer: Viewer) -> float:
    """The first prompt's video anew. Seconds to its first frame."""
    before = viewer.page.evaluate(
        """(prompt) => {
          document.getElementById("prompt").value = prompt;
          window.frames_shown.length = window.pictures.length = 0;
          const now = performance.now();
          document.getElementById("again").click();
          return now;
        }""",
        BEGINS,
    )
    viewer.wait("window.frames_shown.length > 0")
    return (shown(viewer)[0][0] - before) / 1000


def pictures(viewer: Viewer) -> dict[int, np.ndarray]:
    """What has been shown since the beginning, by the number of the frame."""
    fps = viewer.page.evaluate("fetch('api').then((answer) => answer.json()).then((about) => about.fps)")
    found = viewer.page.evaluate("window.pictures")
    return {
        round(frame[1] * fps): np.asarray(picture, int).reshape(SIDE, SIDE, 4)[..., :3]
        for frame, picture in zip(shown(viewer), found, strict=False)
    }


def change(viewer: Viewer, prompt: str, channel: int, without: dict[int, np.ndarray]) -> dict[str, float]:
    """Seconds until it is seen, and until its colour is. without: the pictures of the video without it."""
    said = viewer.page.evaluate(
        """(prompt) => {
          document.getElementById("prompt").value = prompt;
          document.querySelector("#prompt-form button").click();
          return performance.now();
        }""",
        prompt,
    )
    end = time.monotonic() + 20
    while not [f for f in shown(viewer) if f[0] > said and is_colour(f[2], channel)]:
        if time.monotonic() > end:
            raise RuntimeError(f"{prompt!r} was not seen in 20 s")
        viewer.page.wait_for_timeout(10)
    viewer.plays(0.5)
    after = [(f[0], f[2], number) for f, number in zip(shown(viewer), pictures(viewer), strict=False) if f[0] > said]
    now = pictures(viewer)
    other = [at for at, _, n in after if n in without and (np.abs(now[n] - without[n]).max(-1) > 24).mean() > 0.01]
    obeyed = [at for at, colour, _ in after if is_colour(colour, channel)]
    return {name: (times[0] - said) / 1000 for name, times in (("seen", other), ("obeyed", obeyed))}


def stalls(viewer: Viewer, seconds: float) -> tuple[float, int]:
    """Of frames while nothing happens: by how much their times are apart from what they should be, and how many."""
    viewer.page.evaluate("window.frames_shown.length = 0")
    viewer.page.wait_for_timeout(1000 * seconds)
    frames = shown(viewer)
    passed = (frames[-1][0] - frames[0][0]) / 1000
    return max(0.0, passed - (frames[-1][1] - frames[0][1])), len(frames)


def rate(url: str, seconds: float = 30.0) -> float:
    """Of a reader that takes all there is."""
    with open_stream(url, more=4) as stream:
        stream.next()
        begun = time.monotonic()
        for part in stream:
            if part.start >= seconds:
                return part.start / (time.monotonic() - begun)
    raise RuntimeError("the stream ended")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    parser.add_argument("--shots", type=Path, metavar="FOLDER", help="pictures of the page")
    parser.add_argument("flags", nargs="*", help="of rcm_jax.serve, after --")
    args = parser.parse_args()
    found = {"first": [], "seen": [], "obeyed": []}
    with Command(*args.flags) as server, chromium() as browser:
        found["rate"] = rate(server.url)
        viewer = Viewer(browser, server.url, viewport={"width": 900, "height": 1010})
        viewer.plays(1.0)
        viewer.page.evaluate(RECORD)
        begin(viewer)
        viewer.plays(8.0)
        without = pictures(viewer)
        for i in range(args.rounds):
            for prompt, channel in PROMPTS:
                found["first"].append(begin(viewer))
                viewer.plays(1.0 + 0.037 * i)  # so that it is said at any place in a chunk
                for name, seconds in change(viewer, prompt, channel, without).items():
                    found[name].append(seconds)
        found["stalls"], found["frames"] = stalls(viewer, 20)
        if args.shots is not None:
            viewer.page.screenshot(path=args.shots / "serve.png")
            phone = Viewer(browser, server.url, viewport={"width": 390, "height": 844}, is_mobile=True)
            phone.plays(1.0)
            phone.page.screenshot(path=args.shots / "serve_phone.png")
    for name in ("first", "seen", "obeyed"):
        times = found[name]
        print(f"{name:13} median {statistics.median(times):.3f} s, worst {max(times):.3f} s of {len(times)}")
    print(f"stalls        {found['stalls']:.3f} s in 20 s, {found['frames']} frames shown")
    print(f"rate          {found['rate']:.1f} times as fast as it plays")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
