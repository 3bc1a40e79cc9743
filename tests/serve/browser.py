"""A real Chromium and what a viewer sees in it."""

import contextlib
import shutil
import time

from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
# the colour of the shape: of what is farthest from white in the frame that is shown
COLOUR = """() => {
  const video = document.getElementById("video"), canvas = document.createElement("canvas");
  if (!video.videoWidth) return null;
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(video, 0, 0);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  let best = [255, 255, 255];
  for (let i = 0; i < data.length; i += 4) {
    const pixel = [data[i], data[i + 1], data[i + 2]];
    if (Math.min(...pixel) < Math.min(...best)) best = pixel;
  }
  return best;
}"""


@contextlib.contextmanager
def chromium():
    """Raises where there is none: the page is tested in a real one, or not at all."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        raise RuntimeError("these tests need Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Viewer:
    """One tab. wrong: what the console told."""

    def __init__(self, browser, url, **device):
        self.page, self.wrong = browser.new_context(accept_downloads=True, **device).new_page(), []
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.wrong.append(said.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.goto(url)

    def wait(self, expression, seconds=20):
        """Until the expression is true in the page, which does not let a driver put code of its own into it."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"not in {seconds} s: {expression}; the page says {self.notice!r}"
            self.page.wait_for_timeout(20)

    def plays(self, seconds=0.6):
        """Until so much more has played."""
        self.wait(f"document.getElementById('video').currentTime > {self.time + seconds}")

    @property
    def time(self):
        return self.page.evaluate("document.getElementById('video').currentTime")

    @property
    def notice(self):
        return self.page.inner_text("#notice")

    def say(self, prompt):
        self.page.fill("#prompt", prompt)
        self.page.click("#prompt-form button")

    def sees(self, channel, seconds=20):
        """Until the shape has that colour: 0 is red, 2 blue. The time of the frame."""
        self.wait(
            f"(() => {{ const c = ({COLOUR})(); "
            f"return c && c[{channel}] > 1.4 * Math.max(...c.filter((_, i) => i !== {channel})); }})()",
            seconds,
        )
        return self.time

    def close(self):
        self.page.context.close()
