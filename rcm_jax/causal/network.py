"""The DiT as a causal network (arXiv 2606.25473): under masks for training, with a key/value cache for sampling.

Same network, same parameters. In training all chunks of a video go through it at once, beside the context whose keys
they see; in sampling one chunk of latent frames at a time, which sees the keys of the chunks before it in a cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from rcm_jax.causal.cache import Anew, Cache, CachePolicy, Geometry, Ring
from rcm_jax.causal.quantised import holds_all
from rcm_jax.chunks import ChunkIndex, ChunkPattern, block_causal, check_window, teacher_forcing
from rcm_jax.flow import guided, null_rows
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.types import Latents, Params, Text, Velocity
from rcm_jax.wan.dit import MODEL_TIME, ContextVideo, DiT
from rcm_jax.wan.layers import Attention, KeyValues


@dataclasses.dataclass(frozen=True)
class CausalDiT:
    """A DiT that reads video in chunks. `window` and `sink` count chunks (see `rcm_jax.chunks`).

    frames: latent frames that the cache holds without a window; with one, a cache serves videos of any length.
    size: latent rows and columns.
    policy: what the cache keeps of the past, where it is not what window and sink say.
    """

    dit: DiT
    pattern: ChunkPattern
    frames: int
    size: tuple[int, int]
    window: int | None = None
    sink: int = 0
    policy: CachePolicy | None = None

    def __post_init__(self) -> None:
        check_window(self.window, self.sink)
        self.pattern.spans(self.frames)  # its error
        self.dit.config.grid((self.dit.config.patch_size[0], *self.size))
        if self.dit.config.patch_size[0] != 1:
            raise ValueError(f"patch_size={self.dit.config.patch_size}: a causal network needs tokens of one frame")
        self.keeps.check(self.geometry)

    # --- masks ---------------------------------------------------------------------------------------------------

    @property
    def frame_tokens(self) -> int:
        return self.geometry.frame_tokens

    def mask(self, frames: int) -> KeyRuns:
        """The block-causal mask of a video of so many latent frames."""
        return block_causal(self.pattern.spans(frames), self.frame_tokens, window=self.window, sink=self.sink)

    def forcing_mask(self, frames: int) -> KeyRuns:
        """The teacher-forcing mask of the packed sequence of twice so many latent frames."""
        return teacher_forcing(self.pattern.spans(frames), self.frame_tokens, window=self.window, sink=self.sink)

    def forced_masks(self, frames: int) -> tuple[KeyRuns, KeyRuns]:
        """The noisy half's rows of it by the half that they see: (keys of the clean video, its own keys)."""
        ends = self.mask(frames).query_ends
        rows = self.forcing_mask(frames).runs[len(ends) :]
        own = tuple(tuple((a - ends[-1], b - ends[-1]) for a, b in runs[-1:]) for runs in rows)
        return KeyRuns(ends, tuple(runs[:-1] for runs in rows)), KeyRuns(ends, own)

    def velocity(self, params: Params, text: Text) -> Velocity:
        """(x_t, t) -> v under the block-causal mask, t [B] or [B, T]."""
        return lambda x, t: self.dit.apply(
            {"params": params}, x, MODEL_TIME * t, text, mask=self.mask(x.shape[1])
        )  # fmt: skip

    def forced_velocity(
        self, params: Params, text: Text, context: Latents, t_context: Float[Array, "B T"] | None = None
    ) -> Velocity:
        """(x_t, t) -> v of noisy video, each chunk of which sees the context's chunks before it: teacher forcing.

        The context is clean video, or video noised to `t_context`. It passes beside x_t, which it does not see: it has
        no tangent where x_t and t have one, and nothing of one is computed.
        """

        def v(x: Latents, t: Array) -> Latents:
            seen, own = self.forced_masks(x.shape[1])
            t_clean = jnp.zeros_like(t) if t_context is None else t_context.astype(t.dtype)
            beside = ContextVideo(context.astype(x.dtype), MODEL_TIME * t_clean, self.mask(x.shape[1]), seen)
            return self.dit.apply({"params": params}, x, MODEL_TIME * t, text, mask=own, beside=beside)

        return v

    def guided_forced_velocity(
        self, params: Params, text: Text, null_text: Float[Array, "L D"] | Text, guidance: float, context: Latents
    ) -> Velocity:
        """`forced_velocity` on a clean context, under guidance against one text for all videos, or one a video."""
        texts = text, null_rows(null_text, text.shape[0])
        cond, uncond = (self.forced_velocity(params, which, context) for which in texts)
        return guided(cond, uncond, guidance)

    # --- the cache -----------------------------------------------------------------------------------------------

    @property
    def keeps(self) -> CachePolicy:
        """What is kept of the past."""
        return Ring(self.window, self.sink) if self.policy is None else self.policy

    @property
    def geometry(self) -> Geometry:
        c = self.dit.config
        _, *grid = c.grid((1, *self.size))
        return Geometry(self.pattern, self.frames, tuple(grid), c.num_layers, c.num_heads, c.head_dim, c.dtype)

    @property
    def room(self) -> int | None:
        """How many latent frames a video may have; None: any number."""
        return self.frames if holds_all(self.keeps) else None

    def init_cache(self, batch: int) -> Cache:
        """An empty cache."""
        return self.keeps.open(self.geometry, batch)

    def prompt(self, params: Params, text: Text) -> KeyValues:
        """Every layer's cross-attention keys and values of a text: computed once, used by all chunks and steps."""
        c = self.dit.config
        tokens = self.dit.apply({"params": params}, text, method="embed_text")
        cross = Attention(c, self.dit.attend)
        return jax.lax.map(
            lambda p: cross.apply({"params": p}, tokens, method="keys"), params["blocks"]["cross_attn"]
        )  # fmt: skip

    def denoise(
        self, params: Params, x: Latents, t: Float[Array, " B"], prompt: KeyValues, cache: Cache, chunk: ChunkIndex
    ) -> Latents:
        """Velocity of chunk number `chunk` (may be traced), x [B, frames of it, H, W, C], t [B] in [0, 1]."""
        return self._pass(params, x, t, prompt, cache, chunk, appends=False)[0]

    def append(
        self, params: Params, x: Latents, t: Float[Array, " B"], prompt: KeyValues, cache: Cache, chunk: ChunkIndex
    ) -> Cache:
        """The cache with the keys of a chunk in it, as the network has them at time t (0: clean context)."""
        return self.step(params, x, t, prompt, cache, chunk)[1]

    def step(
        self, params: Params, x: Latents, t: Float[Array, " B"], prompt: KeyValues, cache: Cache, chunk: ChunkIndex
    ) -> tuple[Latents, Cache]:
        """`denoise` and `append` of the same x and t in one pass; what is not used of it is not computed under jit.

        Raises ValueError where a chunk's index is known and the cache has no room for it.
        """
        v, kept = self._pass(params, x, t, prompt, cache, chunk, appends=True)
        return v, self.keeps.append(self.geometry, cache, kept, chunk)

    def renew(
        self, params: Params, x: Latents, prompt: KeyValues, cache: Cache, chunk: ChunkIndex, *,
        keep_sink: bool = False, whole: bool = False,
    ) -> Cache:  # fmt: skip
        """The cache that a chunk sees, its keys made anew under another prompt (LongLive's recache, arXiv 2509.22622):
        one pass over the clean latents x [B, T, H, W, C] of the `renewed_frames` before the chunk, which all see one
        another. keep_sink: the sink keeps its keys, and is seen in place of as many first frames. whole: x is all that
        was before the chunk, which is known."""
        ring, geometry, frames = self._ring(), self.geometry, x.shape[1]
        keeps = keep_sink and not whole
        past = Anew(cache, ring.sink_tokens(geometry) if keeps else 0)
        at = geometry.pattern.start(chunk) - frames + jnp.arange(frames)
        t = jnp.zeros(x.shape[:1], x.dtype)
        _, kept = self.dit.apply({"params": params}, x, t, prompt, past=past, frames=at, method="chunk")
        if not keeps and not whole:
            cache = ring.with_sink(geometry, cache, kept)
        return ring.renewed(geometry, cache, kept, chunk, whole=whole)

    def renewed_frames(self, chunk: int) -> int:
        """How many latent frames before a chunk `renew` takes. Raises ValueError for a policy whose keys cannot be made
        anew from the frames before the chunk."""
        return self._ring().anew_frames(self.geometry, chunk)

    def _ring(self) -> Ring:
        if not isinstance(self.keeps, Ring):
            raise ValueError(f"only a cache of the last chunks, or of all, can be made anew, not {self.keeps}")
        return self.keeps

    def _pass(
        self, params: Params, x: Latents, t: Float[Array, " B"], prompt: KeyValues, cache: Cache, chunk: ChunkIndex, *,
        appends: bool,
    ) -> tuple[Latents, PyTree]:  # fmt: skip
        """(velocity, what all layers keep for the policy's `append`)."""
        frames, geometry = x.shape[1], self.geometry
        if isinstance(chunk, int):
            self._check(chunk, frames)
        past = self.keeps.seen(geometry, cache, chunk, appends)
        at = self.keeps.positions(geometry, cache, chunk, frames)
        return self.dit.apply(
            {"params": params}, x, MODEL_TIME * t, prompt, past=past, frames=at, method="chunk"
        )  # fmt: skip

    def _check(self, chunk: int, frames: int) -> None:
        size = self.pattern.rest if chunk else self.pattern.first
        if frames != size:
            raise ValueError(f"chunk {chunk} of pattern {self.pattern} has {size} latent frames, not {frames}")
        end = self.pattern.first + chunk * self.pattern.rest
        if self.room is not None and end > self.room:
            raise ValueError(
                f"chunk {chunk} ends at latent frame {end}, but the cache holds {self.frames}: "
                "give a longer cache or a window"
            )
