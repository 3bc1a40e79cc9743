"""What a recipe's networks read of a sample, and a sample cut to it."""

import dataclasses

import numpy as np

from rcm_jax.data.batch import Batch
from rcm_jax.data.config import DataConfig
from rcm_jax.data.sample import Sample
from rcm_jax.finite import check_finite
from rcm_jax.wan.config import DiTConfig

Row = dict[str, np.ndarray]  # one sample of a Batch, by its fields


@dataclasses.dataclass(frozen=True)
class Wanted:
    """latents, condition: [T, H, W, channels]; text: [tokens, width]; image: the width of CLIP's tokens, and `tokens`
    how many there are in this set. None where the networks take none."""

    latents: tuple[int, int, int, int]
    text: tuple[int, int]
    condition: tuple[int, int, int, int] | None
    image: int | None
    tokens: int | None = None

    @classmethod
    def of(cls, data: DataConfig, model: DiTConfig) -> "Wanted":
        extra = model.in_channels - model.out_channels
        return cls(
            latents=(*data.latent_shape, model.out_channels),
            text=(model.text_len, model.text_dim),
            condition=(*data.latent_shape, extra) if extra else None,
            image=model.image_dim,
        )

    def row(self, sample: Sample, name: str) -> Row:
        """The sample as a batch has it: of a trajectory the clean video, of a longer one its first frames, and zeros
        after the text. Raises ValueError that names the sample, `name`, for other sizes and for what is missing or too
        much, FloatingPointError where a number is not finite."""
        latents = sample.latents[0] if sample.latents.ndim == 5 else sample.latents
        row = {"latents": _frames(latents, self.latents, f"{name}: latents are"), "text": self._text(sample, name)}
        for field, wanted in (("condition", self.condition), ("image", self.image)):
            value = getattr(sample, field)
            if (value is None) != (wanted is None):
                raise ValueError(f"{name} {_lacks(field) if value is None else _needless(field)}")
        if self.condition:
            row["condition"] = _frames(sample.condition, self.condition, f"{name}: condition is")
        if self.image:
            tokens, width = sample.image.shape
            if width != self.image:
                raise ValueError(
                    f"{name}: image is {[tokens, width]}, and the recipe's network takes a width of {self.image}"
                )
            if self.tokens not in (None, tokens):
                raise ValueError(f"{name}: image is {[tokens, width]}, and the set's others have {self.tokens} tokens")
            row["image"] = sample.image
        for field, value in row.items():
            check_finite(_as_stored(value), f"{name}: {field}")
        return row

    def _text(self, sample: Sample, name: str) -> np.ndarray:
        length, width = self.text
        text = sample.text
        if text.shape[1] != width:
            raise ValueError(f"{name}: text is {list(text.shape)}, and the recipe's networks read a width of {width}")
        if text[length:].any():
            raise ValueError(f"{name}: text has {len(text)} tokens, and the recipe's networks read {length}")
        if len(text) >= length:
            return text[:length]
        padded = np.zeros((length, width), text.dtype)
        padded[: len(text)] = text
        return padded


def _frames(video: np.ndarray, wanted: tuple[int, ...], what: str) -> np.ndarray:
    if video.shape[0] < wanted[0] or video.shape[1:] != wanted[1:]:
        raise ValueError(
            f"{what} {list(video.shape)} (frames, rows, columns, channels), and the recipe's are {list(wanted)}"
        )
    return video[: wanted[0]]


def _lacks(field: str) -> str:
    return f"has no {field}, and the recipe's network takes an image: make the set with images (data.prepare)"


def _needless(field: str) -> str:
    return f"has a {field}, and the recipe's network takes no image: use a recipe of image-to-video, or another set"


def _as_stored(video: np.ndarray) -> np.ndarray:
    """Published latents are seen through a change of axes; undone, they are contiguous and need no copy."""
    return video if video.flags.c_contiguous else np.moveaxis(video, -1, 0)


def stacked(rows: list[Row], dtypes: dict[str, np.dtype]) -> Batch:
    """A batch of its rows, each field of one dtype."""
    fields = {}
    for field, dtype in dtypes.items():
        out = np.empty((len(rows), *rows[0][field].shape), dtype)
        for i, row in enumerate(rows):
            value = row[field].astype(dtype, copy=False)
            bits = np.dtype(f"u{dtype.itemsize}")  # NumPy copies bfloat16 number by number
            out.view(bits)[i] = value.view(bits)
        fields[field] = out
    return Batch(**fields)
