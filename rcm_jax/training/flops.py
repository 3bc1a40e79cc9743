"""Floating-point operations of a training step, from the shapes of its config: what MFU is a share of.

Convention: matrix products alone, two operations a multiplication, each product once for every use that the method has
for it. A product of two factors costs once itself; along a direction once more for each factor that moves; in a
gradient once more for each factor that needs one. So a linear layer's tangent costs as much as the layer, its gradient
twice as much; attention's cost twice as much each, and where text is seen, which stands still, its tangent as much.
Attention counts the pairs that its mask allows. Not counted: norms, softmax, the embedding of time, the optimiser, and
whatever is computed again (remat, the scores in attention's backward pass, a rollout's last steps). A LoRA is taken to
be in the blocks; its own products, a few hundredths of the layer's, are not counted.
"""

import dataclasses
import math

from rcm_jax.aot.costs import RATES
from rcm_jax.causal.network import CausalDiT
from rcm_jax.kernels.masks import pairs
from rcm_jax.training.config import RunConfig
from rcm_jax.training.schedule import critic_updates, simulation_steps, step_name, student_updates
from rcm_jax.wan.config import CLIP_VIT_H, DiTConfig
from rcm_jax.wan.dit import DiT

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations for one video: of the value, and what a tangent and a gradient cost besides. of_weights: the part of
    the gradient that is of weights, or of what comes before all layers that may have a LoRA."""

    plain: float = 0.0
    tangent: float = 0.0
    gradient: float = 0.0
    of_weights: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, count: int) -> "Work":
        return Work(*(count * x for x in dataclasses.astuple(self)))

    @property
    def with_weights_that_stand(self) -> "Work":
        return dataclasses.replace(self, gradient=self.gradient - self.of_weights, of_weights=0.0)

    @property
    def with_gradient(self) -> float:
        return self.plain + self.gradient

    @property
    def with_tangent_and_gradient(self) -> float:
        """Value, tangent and gradient of the value in one pass."""
        return self.plain + self.tangent + self.gradient


def _product(multiplications: float, moving: int, learned: int, weights: int = 0) -> Work:
    """Of whose two factors so many move along the tangent, and so many need a gradient, of which so many are weights or
    stand before all that learns in a LoRA."""
    once = 2.0 * multiplications
    return Work(once, moving * once, learned * once, weights * once)


# --- a network --------------------------------------------------------------------------------------------------------


def image_tokens(c: DiTConfig) -> int:
    return 0 if c.image_dim is None else CLIP_VIT_H.tokens


def blocks(c: DiTConfig, tokens: int, seen: int, *, still: int = 0, moves: bool = True) -> Work:
    """Tokens through all blocks: self-attention over `seen` pairs, and over `still` pairs whose keys do not move."""
    around = tokens * (c.text_len + image_tokens(c))
    layer = _product(tokens * (6 * c.dim + 2 * c.ffn_dim) * c.dim, moves, 2, 1)
    layer += _product(2 * seen * c.dim, 2 * moves, 2) + _product(2 * (still + around) * c.dim, moves, 2)
    return layer.times(c.num_layers)


def prompt(c: DiTConfig) -> Work:
    """Text and image tokens to the keys and values of every layer."""
    image, width = image_tokens(c), c.image_dim or 0
    embedded = _product(c.text_len * c.text_dim * c.dim, 0, 1, 1) + _product(c.text_len * c.dim**2, 0, 2, 2)
    embedded += _product(image * (width + c.dim) * width, 0, 2, 2)
    return embedded + _product(2 * (c.text_len + image) * c.dim**2, 0, 2, 2).times(c.num_layers)


def patches(c: DiTConfig, tokens: int) -> Work:
    """The embedding of patches before the blocks; its input is data."""
    return _product(tokens * math.prod(c.patch_size) * c.in_channels * c.dim, 1, 1, 1)


def head(c: DiTConfig, tokens: int) -> Work:
    return _product(tokens * math.prod(c.patch_size) * c.out_channels * c.dim, 1, 2, 1)


def forward(c: DiTConfig, latent_shape: Shape, seen: int | None = None) -> Work:
    """A call for a whole video; `seen`: how many pairs its mask allows, all without one."""
    tokens = math.prod(c.grid(latent_shape))
    seen = tokens**2 if seen is None else seen
    return patches(c, tokens) + prompt(c) + blocks(c, tokens, seen) + head(c, tokens)


def _masked(network: CausalDiT, frames: int) -> Work:
    """A call under the block-causal mask: diffusion forcing."""
    tokens = frames * network.frame_tokens
    return forward(network.dit.config, (frames, *network.size), pairs(network.mask(frames), tokens, tokens))


def _forced(network: CausalDiT, frames: int) -> Work:
    """A call beside clean context: the context's own pass, which does not move, and the noisy half's over its keys."""
    c, tokens = network.dit.config, frames * network.frame_tokens
    clean, (seen, own) = network.mask(frames), network.forced_masks(frames)
    clean_pairs, seen_pairs, own_pairs = (pairs(mask, tokens, tokens) for mask in (clean, seen, own))
    beside = dataclasses.replace(patches(c, tokens) + blocks(c, tokens, clean_pairs, moves=False), tangent=0.0)
    noisy = patches(c, tokens) + blocks(c, tokens, own_pairs, still=seen_pairs) + head(c, tokens)
    return beside + prompt(c) + noisy


# --- a step, for one video --------------------------------------------------------------------------------------------


class _Step:
    """What the steps of a run are made of: a call of each network."""

    def __init__(self, config: RunConfig):
        self.config, self.method, shape = config, config.method, config.data.latent_shape
        student, teacher, score = config.models
        self.student, self.teacher, self.score = (forward(c, shape) for c in (student, teacher, score))
        self.network = None
        if config.causal.pattern:
            forced = self.method.name != "diffusion" or config.causal.forcing == "tf"
            self.network = config.causal.network(DiT(student), shape)
            self.student = (_forced if forced else _masked)(self.network, shape[0])
            self.teacher = _forced(config.causal.network(DiT(teacher), shape), shape[0])
        self.student, self.score = self._learning(self.student), self._learning(self.score)

    def _learning(self, work: Work) -> Work:
        return work.with_weights_that_stand if self.config.lora.rank else work

    def diffusion(self) -> float:
        return self.student.with_gradient

    def consistency(self) -> float:
        """A guided teacher, two calls; sCM's student in one pass, or dCM's at two points, one with gradient."""
        guided = 2 * self.teacher.plain
        if self.method.consistency == "dcm":
            return self.method.dcm_skip * guided + self.student.with_gradient + self.student.plain
        return guided + self.student.with_tangent_and_gradient

    def distribution(self, num_steps: int) -> float:
        """The student's video, the fake score, and a guided teacher."""
        return self.own_video(num_steps).with_gradient + 3 * self.score.plain

    def critic(self, num_steps: int) -> float:
        return self.own_video(num_steps).plain + self.score.with_gradient

    def own_video(self, num_steps: int) -> Work:
        """The student's sampler; the gradient goes through its last step alone."""
        if self.network is None:
            return Work((num_steps - 1) * self.student.plain) + self.student
        c, network, total = self.network.dit.config, self.network, prompt(self.network.dit.config)
        schedule = self.config.causal.schedule(math.inf)
        for chunk, (start, end) in enumerate(network.pattern.spans(self.config.data.latent_shape[0])):
            tokens = (end - start) * network.frame_tokens
            steps = min(num_steps, len(schedule.chunk(chunk)[0]) - 1)
            body = patches(c, tokens) + blocks(c, tokens, tokens * end * network.frame_tokens)
            last = body + head(c, tokens)
            total += Work((steps - 1) * last.plain + body.plain) + last  # the second: its keys for the cache
        return self._learning(total)


def kind_flops(config: RunConfig, kind: str, num_steps: int = 1) -> float:
    """Of a step of that name (`schedule.step_name`) on its whole batch, which simulates so many sampler steps."""
    step = _Step(config)
    if kind == "diffusion":
        video = step.diffusion()
    elif kind == "critic":
        video = step.critic(num_steps)
    else:
        video = step.consistency() if config.method.uses_consistency else 0.0
        video += step.distribution(num_steps) if kind == "student_dmd" else 0.0
    return config.data.batch_size * video


def step_flops(config: RunConfig, step: int) -> float:
    """Of the run's step number `step` on its whole batch, all devices together."""
    kind, method = step_name(config.method, step), config.method
    updates = critic_updates if kind == "critic" else student_updates
    return kind_flops(config, kind, simulation_steps(method, updates(method, step)))


def peak(device_kind: str) -> float | None:
    """FLOP/s of bfloat16 products by data sheet; None for a device that is not in the list."""
    kind = device_kind.upper()
    return next((rates.products for name, rates in RATES.items() if name.upper().replace("_", " ") in kind), None)
