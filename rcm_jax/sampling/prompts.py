"""Prompts that change while a video is made: which text a chunk follows, for whole rollouts and for streams.

A `PromptSchedule` is when: the chunks from which each of several prompts holds, at once or blended in. A `Script` is
when and what: the same with the prompts' features, of which it gives every chunk its own.

    chunk         0    1    2    3    4    5
    starts (0, 2), blend 1        old  old  new  new  new  new
    starts (0, 2), blend 3        old  old  1/3  2/3  new  new        share of the new prompt's features
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Weights = tuple[float, ...]  # of the prompts, which sum to 1


class Cut(NamedTuple):
    """A text that begins another scene."""

    text: Float[Array, "B L D"]


@dataclasses.dataclass(frozen=True)
class PromptSchedule:
    """Prompt i holds from chunk `starts[i]` on; the first from chunk 0.

    blend: over so many chunks the features go from what held before to the new prompt's, the first of them at
    1/blend: 1 is at once. cuts: chunks that begin another scene; a prompt that comes with a cut is there at once.
    """

    starts: tuple[int, ...] = (0,)
    cuts: tuple[int, ...] = ()
    blend: int = 1

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in itertools.pairwise(self.starts))
        if not self.starts or self.starts[0] != 0 or not rising:
            raise ValueError(f"prompts that start at chunks {self.starts}: the first must be 0, and they must rise")
        if self.blend < 1:
            raise ValueError(f"blend={self.blend} must be at least 1 chunk")

    def weights(self, chunk: int) -> Weights:
        """How much of each prompt a chunk follows. A change that comes while another still blends goes on from the
        mixture."""
        which = max(i for i, start in enumerate(self.starts) if start <= chunk)
        start = self.starts[which]
        done = 1.0 if which == 0 or start in self.cuts else min(1.0, (chunk - start + 1) / self.blend)
        before = self.weights(start - 1) if done < 1 else (0.0,) * len(self.starts)
        return tuple(done * (i == which) + (1 - done) * weight for i, weight in enumerate(before))

    def check_chunks(self, count: int) -> None:
        """Raises ValueError for a prompt that begins after a video of so many chunks."""
        if self.starts[-1] >= count:
            raise ValueError(f"a prompt starts at chunk {self.starts[-1]}; the video has {count}")

    def changes(self, chunk: int) -> bool:
        """Whether it follows another text than the chunk before; of the first chunk, no."""
        return chunk > 0 and self.weights(chunk) != self.weights(chunk - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Script:
    """The prompts' features, [B, L, D] each and all of one shape, and when each holds.

    A blend is linear. It meets both ends exactly, words that two prompts share at one place stay what they are, and it
    is defined for the rows after the shorter prompt's end, which are zeros and have no direction for a spherical one.
    Nor would a row's length, which a spherical blend keeps, reach attention as it is: an MLP and the norm of the keys
    come after it.
    """

    texts: tuple[Float[Array, "B L D"], ...]
    schedule: PromptSchedule = PromptSchedule()

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.schedule.starts):
            raise ValueError(f"{len(self.texts)} prompts for {len(self.schedule.starts)} starts")

    def at(self, chunk: int) -> Float[Array, "B L D"]:
        """What a chunk follows."""
        shares = [(weight, text) for weight, text in zip(self.schedule.weights(chunk), self.texts, strict=True)]
        first, *others = [share for share in shares if share[0]]
        if not others:
            return first[1]
        mixed = sum(weight * text.astype(jnp.float32) for weight, text in (first, *others))
        return mixed.astype(first[1].dtype)

    def change(self, chunk: int) -> Float[Array, "B L D"] | None:
        """What a chunk follows, if the chunk before follows another text."""
        return self.at(chunk) if self.schedule.changes(chunk) else None

    def sent(self, chunk: int, text: Float[Array, "B L D"] | Cut) -> "Script":
        """From a chunk on this text, in place of all that would come: what somebody says now counts for more than what
        was planned. It blends in as the planned ones do."""
        text, cuts = (text.text, (chunk,)) if isinstance(text, Cut) else (text, ())
        if chunk == 0:
            return Script((text,), PromptSchedule(blend=self.schedule.blend))
        return Script((self.at(chunk - 1), text), PromptSchedule((0, chunk), cuts, self.schedule.blend))
