"""Captions of the built-in world, and the features a network sees of them: one fixed random vector a word."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

COLOURS = {
    "red": (0.9, -0.7, -0.7),
    "green": (-0.7, 0.7, -0.6),
    "blue": (-0.7, -0.4, 0.9),
    "yellow": (0.9, 0.8, -0.7),
}
SHAPES = {"circle": 1.0, "square": math.sqrt(math.pi) / 2, "diamond": math.sqrt(math.pi / 2)}  # half extent / radius
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WORDS = {
    "article": ("a",),
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "verb": ("moving",),
    "direction": tuple(DIRECTIONS),
}
TEXT_LEN, TEXT_DIM = 8, 64


@dataclasses.dataclass(frozen=True)
class Caption:
    colour: str
    shape: str
    direction: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"

    @classmethod
    def parse(cls, text: str) -> "Caption":
        """Reads a full caption; raises ValueError for anything else, prompts of fewer words included."""
        match _words(text):
            case ["a", colour, shape, "moving", direction] if (
                colour in COLOURS and shape in SHAPES and direction in DIRECTIONS
            ):
                return cls(colour, shape, direction)
        raise ValueError(f"{text!r} is not a caption of the built-in world, as {captions()[0]!r} is; {_vocabulary()}")


@functools.cache
def all_captions() -> tuple[Caption, ...]:
    return tuple(Caption(*names) for names in itertools.product(COLOURS, SHAPES, DIRECTIONS))


def captions() -> list[str]:
    """The 48 captions; `Scenes.caption` counts in this order."""
    return [str(c) for c in all_captions()]


def encode_text(prompts: Sequence[str]) -> Float[np.ndarray, "B L D"]:
    """One fixed random vector a word, in order, zero rows after the last; "" is all zeros, the unconditional text.

    A prompt need not be a full caption ("red circle" will do). An unknown word or more than TEXT_LEN words raise
    ValueError.
    """
    vectors = _word_vectors()
    out = np.zeros((len(prompts), TEXT_LEN, TEXT_DIM), np.float32)
    for row, prompt in zip(out, prompts, strict=True):
        words = _words(prompt)
        if unknown := [w for w in words if w not in vectors]:
            raise ValueError(f"unknown words {unknown} in the prompt {prompt!r}; {_vocabulary()}")
        if len(words) > TEXT_LEN:
            raise ValueError(f"the prompt {prompt!r} has {len(words)} words; at most {TEXT_LEN} fit")
        for slot, word in zip(row, words, strict=False):
            slot[:] = vectors[word]
    return out


def _words(prompt: str) -> list[str]:
    return prompt.lower().split()


def _vocabulary() -> str:
    return "the known words are " + "; ".join(f"{group}: {', '.join(words)}" for group, words in WORDS.items())


@functools.cache
def _word_vectors() -> dict[str, Float[np.ndarray, " D"]]:
    # RandomState's normals are frozen for ever, a Generator's are not; trained checkpoints depend on these numbers.
    words = [w for group in WORDS.values() for w in group]
    return dict(zip(words, np.random.RandomState(11).standard_normal((len(words), TEXT_DIM)), strict=True))
