"""Where a run's batches come from, as a frozen dataclass."""

import dataclasses

from rcm_jax.ranges import at_least, check_settings


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`toy` renders the built-in world; `shards` reads tar shards of latents and text embeddings from `path`.

    `latent_shape` is (T, H, W) in latent units; for `toy` it is the world's own and need not be given.
    """

    name: str = "toy"
    path: str = ""
    null_text: str = ""
    batch_size: int = 16
    latent_shape: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        object.__setattr__(self, "latent_shape", tuple(self.latent_shape))
        check_settings(self, "data.", batch_size=at_least(1))
        if self.name not in ("toy", "shards"):
            raise ValueError(f"data.name={self.name!r} is unknown; use 'toy' or 'shards'")
