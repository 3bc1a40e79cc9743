import numpy as np
import pytest
from PIL import Image

from rcm_jax.chunks import ChunkPattern, block_causal, teacher_forcing
from rcm_jax.chunks import __main__ as command
from rcm_jax.kernels.masks import dense


@pytest.mark.parametrize(
    ("pattern", "frames", "spans"),
    [
        ("c1-1", 3, ((0, 1), (1, 2), (2, 3))),
        ("c3-3", 6, ((0, 3), (3, 6))),
        ("c1-4", 9, ((0, 1), (1, 5), (5, 9))),
        ("c5-2", 5, ((0, 5),)),
    ],
)
def test_spans(pattern, frames, spans):
    assert ChunkPattern.parse(pattern).spans(frames) == spans
    assert str(ChunkPattern.parse(pattern)) == pattern


def test_a_pattern_that_does_not_fit_lists_those_that_do():
    with pytest.raises(ValueError, match="c1-4 does not fit 6 latent frames; these do: c1-1, c1-5, c2-2"):
        ChunkPattern.parse("c1-4").spans(6)
    with pytest.raises(ValueError, match="c3-3 does not fit 2"):
        ChunkPattern.parse("c3-3").spans(2)


@pytest.mark.parametrize("text", ["1-4", "c1", "c1-4x", "c-1-4", "c0-1", "c1-0"])
def test_what_is_no_pattern(text):
    with pytest.raises(ValueError, match="chunk pattern"):
        ChunkPattern.parse(text)


def by_definition(spans, frame_tokens, window, sink, forcing):
    """The masks from their definition, pair of tokens by pair of tokens."""
    chunk = np.repeat([i for i, (a, b) in enumerate(spans) for _ in range(a, b)], frame_tokens)
    n = len(chunk)

    def kept(q, k):
        return k < sink or window is None or k > q - window

    half = np.array([[chunk[k] <= chunk[q] and kept(chunk[q], chunk[k]) for k in range(n)] for q in range(n)])
    if not forcing:
        return half
    own = chunk[:, None] == chunk[None, :]
    return np.block([[half, np.zeros_like(half)], [half & ~own, own]])


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (None, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 2), (9, 1)])
@pytest.mark.parametrize(("pattern", "frames"), [("c1-1", 6), ("c2-3", 8), ("c3-1", 6), ("c4-4", 4)])
def test_masks_are_their_definition(pattern, frames, window, sink):
    spans = ChunkPattern.parse(pattern).spans(frames)
    for function, forcing in ((block_causal, False), (teacher_forcing, True)):
        mask = function(spans, 2, window=window, sink=sink)
        size = mask.query_ends[-1]
        np.testing.assert_array_equal(
            dense(mask, size, size), by_definition(spans, 2, window, sink, forcing), err_msg=f"{function.__name__}"
        )


@pytest.mark.parametrize(("window", "sink"), [(0, 0), (None, -1), (1, 2)])
def test_windows_that_cannot_be(window, sink):
    with pytest.raises(ValueError, match="window"):
        block_causal(((0, 1), (1, 2)), 1, window=window, sink=sink)


def test_the_command_draws_the_mask(tmp_path, capsys):
    path = tmp_path / "new" / "mask.png"
    command.main(["--pattern", "c1-4", "--frames", "9", "--save", str(path)])
    assert capsys.readouterr().out.strip() == str(path)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    blue = (pixels[:, 2].astype(int) - pixels[:, 0] > 60).mean()
    assert 0.1 < blue < 0.6  # about a third of the pairs are allowed

    with pytest.raises(SystemExit, match="error: chunk pattern c1-4 does not fit 8"):
        command.main(["--frames", "8", "--save", str(tmp_path / "none.png")])
    assert not (tmp_path / "none.png").exists()
