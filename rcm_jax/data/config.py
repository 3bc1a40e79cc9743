"""Where a run's batches come from, as a frozen dataclass."""

import dataclasses

from rcm_jax.ranges import at_least, check_settings


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`toy` renders the built-in world; `shards` reads tar shards of latents and text embeddings from `path`, a folder
    or an fsspec address.

    `latent_shape` is (T, H, W) in latent units; for `toy` it is the world's own and need not be given.
    null_text: a file of the text that guidance leads away from; "toy" is the built-in world's.
    shuffle: another order each epoch; without, that of the names. window: so many shards are mixed with one another.
    max_bad: so many samples that cannot be used are left out; one more ends the run. threads: that read ahead.
    reencode: latents are decoded and encoded again before use, as the published bidirectional trainer does.
    """

    name: str = "toy"
    path: str = ""
    null_text: str = ""
    batch_size: int = 16
    latent_shape: tuple[int, int, int] = (0, 0, 0)
    shuffle: bool = True
    window: int = 8
    max_bad: int = 16
    threads: int = 8
    reencode: bool = False

    def __post_init__(self):
        object.__setattr__(self, "latent_shape", tuple(self.latent_shape))
        once = at_least(1)
        check_settings(self, "data.", batch_size=once, window=once, threads=once, max_bad=at_least(0))
        if self.name not in ("toy", "shards"):
            raise ValueError(f"data.name={self.name!r} is unknown; use 'toy' or 'shards'")
