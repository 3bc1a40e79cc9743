"""Sizes of the Wan2.1 networks."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """A Wan2.1 DiT. Field names are the field's own; lengths in tokens, widths in numbers.

    `image_dim` is the width of the CLIP tokens that an image-to-video network attends to besides the text, None for a
    network without them. Its `in_channels` count noise and condition: 16 + 4 (mask) + 16 (latents of the image).

    `dtype` is what layers compute in; parameters, modulation, norms' statistics and softmax stay float32.
    `round_time_to` rounds the model time before its embedding: "bfloat16" for the released rCM checkpoints, which were
    trained that way, else None. `remat` recomputes a block in the backward pass, keeping only attention's outputs.
    `unroll` blocks are compiled in a row: faster steps for a small network on a CPU, longer compilation.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int | None = None
    eps: float = 1e-6
    dtype: str = "float32"
    round_time_to: str | None = None
    remat: bool = True
    unroll: int = 1
    attention: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} must be divisible by num_heads={self.num_heads}")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"head_dim={self.head_dim} (dim / num_heads) must be even and at least 6: RoPE rotates pairs"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim={self.freq_dim} must be even: half cosines, half sines")
        np.dtype(self.dtype) if self.dtype != "bfloat16" else None

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def grid(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens along (frame, row, column) of a latent of (T, H, W)."""
        if any(n % p for n, p in zip(latent_shape, self.patch_size, strict=True)):
            raise ValueError(
                f"latent (T, H, W)={tuple(latent_shape)} must be divisible by patch_size={self.patch_size}"
            )
        return tuple(n // p for n, p in zip(latent_shape, self.patch_size, strict=True))


WAN_1_3B = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, dtype="bfloat16")
WAN_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, dtype="bfloat16")
WAN_14B_I2V = dataclasses.replace(WAN_14B, in_channels=36, image_dim=1280)
# Wan2.2 A14B: two networks of one size, for the noisy and the clean part of the way (`dit.by_noise`); no CLIP tokens
WAN22_A14B_T2V = WAN_14B
WAN22_A14B_I2V = dataclasses.replace(WAN_14B, in_channels=36)
WAN22_BOUNDARY = {"t2v": 0.875, "i2v": 0.9}
