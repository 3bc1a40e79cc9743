"""What a viewer waits for, measured in a browser from the pixels that it shows.

    python -m tests.benchmarks.live_page [--rounds 12] [--json OUT] [--shots FOLDER] [-- FLAGS OF rcm_jax.serve]

The server is started first, and its programs are compiled. Then, in Chromium on the same machine:

first       seconds from the click on `Start anew` to the first frame that is shown
change      seconds from the click on `Say`, with another colour, to the first frame of that colour; and how much video
            was shown in between
stalls      seconds by which the frames came later than they should have while nothing was asked for
rate        video seconds a second that a reader gets that plays nothing (`rcm_jax.serve.client`)
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from rcm_jax.serve.client import open_stream
from tests.serve.browser import COLOUR, Viewer, chromium
from tests.serve.test_main import Command

PROMPTS = ("a red circle moving left", 0), ("a blue square moving up", 2)
RECORD = f"""() => {{
  const colour = {COLOUR}, video = document.getElementById("video");
  window.frames_shown = [];
  const seen = (now, frame) => {{
    window.frames_shown.push([performance.now(), frame.mediaTime, colour()]);
    video.requestVideoFrameCallback(seen);
  }};
  video.requestVideoFrameCallback(seen);
}}"""


def shown(viewer: Viewer) -> list:
    return viewer.page.evaluate("window.frames_shown")


def is_colour(pixel: list[int], channel: int) -> bool:
    return pixel is not None and pixel[channel] > 1.4 * max(v for i, v in enumerate(pixel) if i != channel)


def first_frame(viewer: Viewer) -> float:
    before = viewer.page.evaluate(
        "() => { window.frames_shown.length = 0; const t = performance.now();"
        " document.getElementById('again').click(); return t; }"
    )
    viewer.wait("window.frames_shown.length > 0")
    return (shown(viewer)[0][0] - before) / 1000


def change(viewer: Viewer, prompt: str, channel: int) -> tuple[float, float]:
    """Seconds to the first frame that shows it, and seconds of video shown until then."""
    said, at = viewer.page.evaluate(
        """(prompt) => {
          document.getElementById("prompt").value = prompt;
          document.querySelector("#prompt-form button").click();
          return [performance.now(), document.getElementById("video").currentTime];
        }""",
        prompt,
    )
    end = time.monotonic() + 20
    while time.monotonic() < end:
        after = [f for f in shown(viewer) if f[0] > said and is_colour(f[2], channel)]
        if after:
            return (after[0][0] - said) / 1000, after[0][1] - at
        viewer.page.wait_for_timeout(10)
    raise RuntimeError(f"{prompt!r} was not seen in 20 s")


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
    found = {"first": [], "change": [], "change_video": []}
    with Command(*args.flags) as server, chromium() as browser:
        found["rate"] = rate(server.url)
        viewer = Viewer(browser, server.url, viewport={"width": 900, "height": 1010})
        viewer.plays(1.0)
        viewer.page.evaluate(RECORD)
        for i in range(args.rounds):
            found["first"].append(first_frame(viewer))
            viewer.plays(1.0 + 0.037 * i)  # so that it is said at any place in a chunk
            for prompt, channel in reversed(PROMPTS):
                seconds, video = change(viewer, prompt, channel)
                found["change"].append(seconds)
                found["change_video"].append(video)
                viewer.plays(0.7 + 0.053 * i)
        found["stalls"], found["frames"] = stalls(viewer, 20)
        if args.shots is not None:
            viewer.page.screenshot(path=args.shots / "serve.png")
            phone = Viewer(browser, server.url, viewport={"width": 390, "height": 844}, is_mobile=True)
            phone.plays(1.0)
            phone.page.screenshot(path=args.shots / "serve_phone.png")
    for name in ("first", "change", "change_video"):
        times = found[name]
        print(f"{name:13} median {statistics.median(times):.3f} s, worst {max(times):.3f} s of {len(times)}")
    print(f"stalls        {found['stalls']:.3f} s in 20 s, {found['frames']} frames shown")
    print(f"rate          {found['rate']:.1f} times as fast as it plays")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
