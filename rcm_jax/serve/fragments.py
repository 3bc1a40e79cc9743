"""Video as browsers play it while it comes: H.264 in fragments of an MP4, one a chunk, all of its frames in it at once.

A muxer keeps the last frame of what it writes until it knows what follows, which here is a chunk away. So each chunk
is muxed by itself, to its end, with its place in time; put behind one another the parts are one file.
"""

import io

import numpy as np
from jaxtyping import UInt8

from rcm_jax.media.video import Mp4

CONTAINER = "frag_custom+empty_moov+default_base_moof+frag_discont+skip_trailer+cmaf"
HEAD = (b"ftyp", b"moov")


class Fragments:
    """One stream's encoder. Odd sizes lose their last row or column."""

    def __init__(self, size: tuple[int, int], fps: float):
        width, height = (side // 2 * 2 for side in size)
        self.fps, self.frames, self.parts = fps, 0, 0
        self._mp4 = Mp4(io.BytesIO(), (width, height), fps, None, {"movflags": "empty_moov"}, live=True)
        self._mp4.begin()

    @property
    def mime(self) -> str:
        """For `MediaSource`: the codec with its profile and level."""
        return f'video/mp4; codecs="avc1.{self._mp4.profile.hex()}"'

    def part(self, frames: UInt8[np.ndarray, "F H W 3"]) -> bytes:
        """The next chunk; with the first one the file's head."""
        import av

        packets = [packet for frame in frames for packet in self._mp4.encoded(frame)]
        out, options = io.BytesIO(), {"movflags": CONTAINER, "use_editlist": "0", "fragment_index": str(self.parts + 1)}
        with av.open(out, "w", format="mp4", options=options) as file:
            self._mp4.mux(packets, file)
        self.frames, self.parts = self.frames + len(frames), self.parts + 1
        return out.getvalue() if self.parts == 1 else _without_head(out.getvalue())

    def close(self) -> None:
        self._mp4.close()
        self._mp4 = None  # and with it the encoder's memory


def _without_head(part: bytes) -> bytes:
    at = 0
    while part[at + 4 : at + 8] in HEAD:
        at += int.from_bytes(part[at : at + 4], "big")
    return part[at:]
