"""The networks of a training step that stand still."""

import dataclasses

import jax

from rcm_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Networks:
    """Parameters by what they are for; None where a step has no use for them. A pytree.

    score_teacher: scores the student's videos in place of `teacher`, which under self forcing is a causal network.
    init: what a student that learns a LoRA starts from, where that is not `teacher`.
    student: where the critic learns, fake_score: where the student does.
    """

    teacher: Params | None = None
    score_teacher: Params | None = None
    init: Params | None = None
    student: Params | None = None
    fake_score: Params | None = None

    @property
    def scoring(self) -> Params:
        """The teacher that distribution matching asks."""
        return self.teacher if self.score_teacher is None else self.score_teacher


jax.tree_util.register_dataclass(Networks, ("teacher", "score_teacher", "init", "student", "fake_score"), ())
