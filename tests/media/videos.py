"""Videos to write, and what is in a file that was written."""

import io

import av
import numpy as np

from rcm_jax.media.video import Mp4


def moving(frames=6, size=32):
    video = np.zeros((frames, size, size, 3), np.uint8)
    for f in range(frames):
        video[f, :, : 4 * f + 4] = (200, 40, 40)
    return video


def decoded(data):
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def close_to(seen, frames):
    return np.abs(seen.astype(int) - frames).mean() < 8  # lossy, and chroma is halved


def fails_at(monkeypatch, frame):
    """The disk is full when the frame comes."""
    add = Mp4.add

    def breaks(self, other):
        if np.array_equal(other, frame):
            raise OSError(28, "No space left on device")
        add(self, other)

    monkeypatch.setattr(Mp4, "add", breaks)
