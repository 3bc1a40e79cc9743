"""Labels over the columns of a picture."""

import numpy as np

from rcm_jax.media.pictures import label_columns


def test_words_that_leave_their_column_go_to_the_next_line():
    frames = np.zeros((2, 10, 430, 3), np.uint8)
    wide = label_columns(frames, ["a red circle moving left"], left=30)
    narrow = label_columns(frames, ["a red circle moving left"] * 4, left=30)
    assert wide.shape[1] < narrow.shape[1]
    for labelled in (wide, narrow):
        assert labelled.shape[1] % 2 == 0
        assert labelled.shape[2] == 430
        np.testing.assert_array_equal(labelled[:, -10:], frames)
        inked = (labelled[0, :-10] < 255).any((0, 2)).nonzero()[0]
        assert inked.min() > 30, "it begins beside the margin of the rows"
    columns = (narrow[0, :-10] < 255).any((0, 2))[30:].reshape(4, 100)
    assert columns.any(1).all()
    assert not columns[:, [0, -1]].any(), "labels do not touch"
