"""The attention problems that the benchmark times: those of Wan at 480p, of its causal students, and short ones."""

import dataclasses

import jax

from rcm_jax.chunks import ChunkPattern, teacher_forcing
from rcm_jax.kernels import masks
from rcm_jax.kernels.masks import KeyRuns

PRODUCTS = {"forward": 2, "tangent": 5, "forward+tangent": 6, "backward": 5}  # of matrices, that a pass must make


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention problem; `mask` keeps what `KeyRuns` needs."""

    name: str
    queries: int
    keys: int
    heads: int
    width: int
    mask: KeyRuns | None = None
    batch: int = 1

    @property
    def scale(self) -> float:
        return self.width**-0.5

    @property
    def runs(self) -> bool:
        """Whether the mask cuts the queries into chunks, so that it is more than a number of keys."""
        return self.mask is not None and bool(self.mask.query_ends)

    @property
    def seen_keys(self) -> int:
        """Keys that any query may see."""
        return self.keys if self.mask is None or self.mask.kv_len is None else int(self.mask.kv_len)

    @property
    def pairs(self) -> int:
        """Allowed (query, key) pairs of one head."""
        return masks.pairs(self.mask, self.queries, self.seen_keys)

    def flops(self, kind: str) -> float:
        return 2.0 * self.batch * self.heads * self.width * self.pairs * PRODUCTS[kind]


FRAME, FRAMES = 1560, 21  # tokens of a latent frame at 480p, latent frames
VIDEO = FRAME * FRAMES


def packed(pattern: str, frames: int, frame_tokens: int) -> KeyRuns:
    """The teacher-forcing mask of a chunk pattern."""
    return teacher_forcing(ChunkPattern.parse(pattern).spans(frames), frame_tokens)


SHAPES = {
    s.name: s
    for s in (
        Shape("wan-1.3b", VIDEO, VIDEO, 12, 128),
        Shape("wan-14b", VIDEO, VIDEO, 40, 128),
        Shape("round", 2**15, 2**15, 12, 128),  # for peers whose tiles must divide the tokens
        Shape("cache-c1", FRAME, VIDEO, 12, 128, KeyRuns(kv_len=VIDEO)),
        Shape("cache-c3", 3 * FRAME, VIDEO, 12, 128, KeyRuns(kv_len=VIDEO)),
        Shape("cache-half", 3 * FRAME, VIDEO, 12, 128, KeyRuns(kv_len=VIDEO // 2)),
        Shape("text", VIDEO, 512, 12, 128),
        Shape("tf-c1-1", 2 * VIDEO, 2 * VIDEO, 12, 128, packed("c1-1", FRAMES, FRAME)),
        Shape("tf-c3-3", 2 * VIDEO, 2 * VIDEO, 12, 128, packed("c3-3", FRAMES, FRAME)),
        Shape("tf-c1-4", 2 * VIDEO, 2 * VIDEO, 12, 128, packed("c1-4", FRAMES, FRAME)),
        Shape("short-1024", 1024, 1024, 16, 64, batch=4),
        Shape("short-999", 999, 999, 16, 64, batch=4),
        Shape("tiny", 96, 96, 2, 32, packed("c1-1", 3, 16)),
        Shape("tiny-dense", 64, 80, 2, 32),
    )
}
TINY = ("tiny", "tiny-dense")
DEFAULT_SHAPES = tuple(name for name in SHAPES if name not in TINY)
HEADLINES = ("wan-1.3b", "cache-c3", "tf-c3-3", "short-1024")  # one of each kind


def operands(shape: Shape, dtype: str) -> dict[str, jax.Array]:
    """Standard normal q, k, v, tq, tk, tv, do."""
    B, N, D = shape.batch, shape.heads, shape.width
    lengths = {"q": shape.queries, "k": shape.keys, "v": shape.keys, "tq": shape.queries, "tk": shape.keys,
               "tv": shape.keys, "do": shape.queries}  # fmt: skip
    keys = jax.random.split(jax.random.key(0), len(lengths))
    return {n: jax.random.normal(key, (B, S, N, D), dtype) for key, (n, S) in zip(keys, lengths.items(), strict=True)}
