"""Chunks of video as parts of one file."""

import io

import av
import numpy as np

from rcm_jax.serve.fragments import Fragments

SIZES = (1, 2, 2, 3)


def boxes(data):
    at, out = 0, []
    while at < len(data):
        out.append(data[at + 4 : at + 8])
        at += int.from_bytes(data[at : at + 4], "big")
    return out


def test_each_chunk_is_whole_and_all_are_one_file():
    levels = np.arange(sum(SIZES), dtype=np.uint8) * 25 + 20
    frames = np.broadcast_to(levels[:, None, None, None], (len(levels), 33, 32, 3))  # an odd height
    encoder, parts, at = Fragments((32, 33), 8), [], 0
    for size in SIZES:
        parts.append(encoder.part(frames[at : at + size]))
        at += size
        so_far = list(av.open(io.BytesIO(b"".join(parts))).decode(video=0))
        assert len(so_far) == at  # the last frame too, before anything follows it
    encoder.close()
    assert boxes(parts[0]) == [b"ftyp", b"moov", b"moof", b"mdat"]
    assert all(boxes(part) == [b"moof", b"mdat"] for part in parts[1:])
    assert [float(frame.pts * frame.time_base) for frame in so_far] == [i / 8 for i in range(len(levels))]
    shown = [frame.to_ndarray(format="rgb24").mean() for frame in so_far]
    np.testing.assert_allclose(shown, levels, atol=3)
    assert (so_far[0].width, so_far[0].height) == (32, 32)


def test_the_codec_is_named_as_browsers_want_it():
    encoder = Fragments((64, 64), 16)
    assert encoder.mime.startswith('video/mp4; codecs="avc1.')
    profile = bytes.fromhex(encoder.mime[-7:-1])
    assert profile[0] in (66, 77, 100)  # baseline, main, high
    assert profile[2] in range(9, 63)
    encoder.close()
