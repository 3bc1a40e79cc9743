"""What the benchmark of changed prompts takes for obedience: the world's own videos, and those of another caption."""

import numpy as np
import pytest

from rcm_jax.chunks import ChunkPattern
from rcm_jax.worlds import toy
from tests.benchmarks.prompt_change import WAYS, captions, obeyed, prompt

SPANS = ChunkPattern(1, 2).spans(toy.FRAMES)[1:]


@pytest.mark.parametrize(("what", "differ"), [("all", {"colour", "shape", "direction"}), ("direction", {"direction"})])
def test_the_worlds_videos_obey_their_own_caption_alone(what, differ):
    pairs = captions(24, what)
    assert len(set(pairs)) == 24
    videos, _ = toy.batch(0, range(24), [old for old, _ in pairs])
    old, new = (obeyed(videos, list(words), SPANS) for words in zip(*pairs, strict=True))
    assert all(right.shape == (24, 4) and right.mean() > 0.97 for right in old.values())
    for seen, right in new.items():
        assert right.mean() < 0.03 if seen in differ | {"all"} else right.mean() > 0.97
    still = obeyed(np.repeat(videos[:, :1], toy.FRAMES, axis=1), [words for words, _ in pairs], SPANS)
    assert not still["direction"].any()


def test_every_way_has_the_same_scenes():
    said = {name: prompt(way, "a", "b", (1.0, 2.5)) for name, way in WAYS.items()}
    assert said.pop("never") == "a [1.0s] | a [2.5s]"
    assert said.pop("from the start") == "b [1.0s] | b [2.5s]"
    assert said.pop("infinity_rope, cut") == "a [1.0s] | b [2.5s#]"
    assert set(said.values()) == {"a [1.0s] | b [2.5s]"}
