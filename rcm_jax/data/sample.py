"""One sample of a training set, as it lies in a shard."""

import dataclasses

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

DTYPES = tuple(np.dtype(dtype) for dtype in (ml_dtypes.bfloat16, np.float32, np.float16))
DIMENSIONS = {"latents": (4, 5), "text": (2,), "condition": (4,), "image": (2,)}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A video's latents and what they are conditioned on; channels last, in the dtype stored.

    latents: or [K, T, H, W, C], the points of an ODE trajectory with the clean video first.
    text: may be shorter than the network's text_len; zeros follow. prompt: its words, for people.
    condition, image: of image-to-video networks, as `Batch` has them.
    Raises ValueError that names the key where a tensor cannot be what it is called.
    """

    key: str
    latents: Shaped[np.ndarray, "T H W C"] | Shaped[np.ndarray, "K T H W C"]
    text: Shaped[np.ndarray, "L D"]
    prompt: str = ""
    condition: Shaped[np.ndarray, "T H W Y"] | None = None
    image: Shaped[np.ndarray, "K I"] | None = None

    def __post_init__(self):
        for name, tensor in self.tensors.items():
            if tensor.ndim not in DIMENSIONS[name] or 0 in tensor.shape:
                wanted = " or ".join(map(str, DIMENSIONS[name]))
                raise ValueError(f"{self.key}: {name} has shape {tensor.shape}, and it has {wanted} dimensions")
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{self.key}: {name} is of {tensor.dtype}; use one of {', '.join(map(str, DTYPES))}")
        if self.condition is not None and self.condition.shape[:3] != self.latents.shape[-4:-1]:
            raise ValueError(
                f"{self.key}: condition has shape {self.condition.shape} beside latents {self.latents.shape}"
            )

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Those that are there, by the names of their fields."""
        values = {name: getattr(self, name) for name in DIMENSIONS}
        return {name: value for name, value in values.items() if value is not None}
