"""Scenes in a prompt: blocks, cuts and frames as published, and what cannot be read."""

import pytest

from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.pipelines.scenes import Scene, has_scenes, read_scenes


@pytest.mark.parametrize(
    ("lengths", "pattern", "frames", "blocks", "cuts"),
    [
        (["5s", "10s#", "10s"], "c3-3", 405, [7, 14, 13], [7]),
        (["2s", "1.5s#", "3s#"], "c1-2", 105, [5, 3, 6], [5, 8]),
        (["1s", "2s"], "c1-4", 49, [2, 2], []),
        (["5s#"], "c3-3", 81, [7], []),  # nothing is before the first scene
        (["4s", ".1s", ".1s"], "c1-4", 65, [3, 1, 1], []),  # 5 would be its own; one is left to each other
        ([".01s"], "c3-3", 9, [1], []),
    ],
)
def test_scenes_are_the_published_ones(lengths, pattern, frames, blocks, cuts):
    prompt = " | ".join(f"scene {i}, with [brackets][{length}]" for i, length in enumerate(lengths))
    scenes, found = read_scenes(prompt, ChunkPattern.parse(pattern))
    assert found == frames
    assert [scene.blocks for scene in scenes] == blocks
    assert [sum(blocks[:i]) for i, scene in enumerate(scenes) if scene.cut] == cuts
    assert [scene.text for scene in scenes] == [f"scene {i}, with [brackets]" for i in range(len(lengths))]


def test_a_world_of_another_rate():
    scenes, frames = read_scenes("a [1s] | b [1s]", ChunkPattern(1, 2), fps=8, stride=1)
    assert scenes == [Scene("a", 5, False), Scene("b", 4, False)]
    assert frames == 17


def test_what_is_one_prompt():
    assert not any(map(has_scenes, ["a fox", "a sign that says [OPEN]", "[5s] of silence", "[wide shot] a fox", ""]))
    assert all(map(has_scenes, ["a fox [5s]", "a | b", "a fox[ 2.5 s# ]"]))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a [5s] | b", "prompt: scene 2, 'b', does not end in its length, as in 'a red fox .5s.'"),
        ("a [5s] | b [-1s]", "scene 2, .* does not end in its length"),
        ("a [5] | b [5s]", "scene 1, .* does not end in its length"),
        ("a [5s] | [5s]", "scene 2 has a length, '.5s.', and no text"),
        ("a [5s] |", "scene 2, '', does not end in its length"),
        ("a [0s]", "scene 1, .* must last more than 0 s"),
        ("a [.1s] | b [.1s] | c[.1s]", "3 scenes in 0.3 s, which are 1 chunks of c3-3: give them longer"),
    ],
)
def test_scenes_that_cannot_be_read(prompt, message):
    with pytest.raises(ArgumentError, match=message):
        read_scenes(prompt, ChunkPattern(3, 3))
