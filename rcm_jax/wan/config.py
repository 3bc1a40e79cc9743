"""Sizes of the networks of Wan2.1 and Wan2.2."""

import dataclasses
import math

import numpy as np

REMAT = ("none", "dots", "attention", "block")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """A Wan2.1 DiT. Field names are the field's own; lengths in tokens, widths in numbers.

    `image_dim` is the width of the CLIP tokens that an image-to-video network attends to besides the text, None for a
    network without them. Its `in_channels` count noise and condition: 16 + 4 (mask) + 16 (latents of the image).
    `image_first` says of a text-to-video network that an image may be its first latent frame, clean, at time 0.

    `dtype` is what layers compute in; parameters, modulation, norms' statistics and softmax stay float32.
    `round_time_to` rounds the model time before its embedding: "bfloat16" for the released rCM checkpoints, which were
    trained that way, else None. `remat` is what the backward pass computes again, to save memory: "none"; "dots" all of
    a block but what self-attention and the products with weights gave; "attention" all but what self-attention gave;
    "block" that too. (False and True, of older files, are "none" and "attention".)
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
    image_first: bool = False
    eps: float = 1e-6
    dtype: str = "float32"
    round_time_to: str | None = None
    remat: str = "attention"
    unroll: int = 1
    attention: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        object.__setattr__(self, "remat", {True: "attention", False: "none"}.get(self.remat, self.remat))
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is unknown; use one of {', '.join(REMAT)}")
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

    @property
    def takes_image(self) -> bool:
        """Whether it makes videos from an image alone: it has channels of a condition behind the noise."""
        return self.in_channels > self.out_channels

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
# Wan2.2 TI2V-5B: from text, or from text and an image; of the latents of Wan2.2's own autoencoder
WAN22_TI2V_5B = DiTConfig(
    dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_channels=48, out_channels=48, image_first=True,
    dtype="bfloat16",
)  # fmt: skip
WAN22_BOUNDARY = {"t2v": 0.875, "i2v": 0.9}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The video autoencoder: `dim` channels at full size, times `dim_mult` at each halving of height and width.

    `temporal_downsample` says which halvings also halve time. `decoder_dim` is the decoder's `dim` where it has its
    own. `patch_size` pixels along each side of a frame are channels to begin with, and again in the end: of a full size
    that is so much smaller. `residual`: every level is added to averages, in the decoder to copies, of what it is made
    of. `mean` and `std` normalise each latent channel. `dtype` is what layers compute in; norms' statistics, softmax,
    latents and video are float32.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    decoder_dim: int | None = None
    patch_size: int = 1
    residual: bool = False
    mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    dtype: str = "float32"
    attention: str = "auto"

    def __post_init__(self):
        for name in ("dim_mult", "temporal_downsample", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(f"temporal_downsample={self.temporal_downsample} needs an entry between two of dim_mult")
        if not len(self.mean) == len(self.std) == self.z_dim:
            raise ValueError(f"mean and std have {len(self.mean)} and {len(self.std)} entries; z_dim is {self.z_dim}")
        if self.decoder_dim == self.dim:
            object.__setattr__(self, "decoder_dim", None)

    @property
    def width(self) -> dict[str, int]:
        """`dim` of each half."""
        return {"encoder": self.dim, "decoder": self.decoder_dim or self.dim}

    @property
    def space(self) -> int:
        """Pixels along a side of a latent pixel."""
        return self.patch_size * 2 ** len(self.temporal_downsample)

    @property
    def time(self) -> int:
        """Frames in a latent frame, but for the first, which holds one."""
        return 2 ** sum(self.temporal_downsample)


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
    """The tiny autoencoder for the same latents: `decoder_widths` from the latents' size to the pixels', and
    `encoder_width` at all sizes.

    `decoder_time` says how many frames each doubling of height and width makes of one, `encoder_time` of how many each
    halving makes one. Decoders with smaller `decoder_time` read the same files: previews with fewer frames.
    """

    decoder_widths: tuple[int, ...] = (256, 128, 64, 64)
    encoder_width: int = 64
    z_dim: int = 16
    decoder_time: tuple[int, ...] = (1, 2, 2)
    encoder_time: tuple[int, ...] = (2, 2, 1)
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("decoder_widths", "decoder_time", "encoder_time"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.decoder_time) == len(self.encoder_time) == len(self.decoder_widths) - 1:
            raise ValueError(
                f"decoder_time={self.decoder_time} and encoder_time={self.encoder_time} need an entry between two of "
                f"decoder_widths={self.decoder_widths}"
            )

    @property
    def space(self) -> int:
        """Pixels along a side of a latent pixel."""
        return 2 ** len(self.decoder_time)

    @property
    def time(self) -> int:
        """Frames that a latent frame becomes, but for the first, of which the last one is kept."""
        return math.prod(self.decoder_time)

    @property
    def seen(self) -> int:
        """Frames that the encoder makes a latent frame of."""
        return math.prod(self.encoder_time)


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """The umT5 encoder. `dtype` is what layers compute in; norms' statistics, scores and softmax are float32."""

    vocabulary: int
    dim: int
    attention_dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: str = "float32"

    def __post_init__(self):
        if self.attention_dim % self.num_heads:
            raise ValueError(f"attention_dim={self.attention_dim} must be divisible by num_heads={self.num_heads}")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """CLIP's image tower without its last block: Wan takes the tokens before it. `num_layers` counts what is left."""

    dim: int
    num_heads: int
    num_layers: int
    image_size: int = 224
    patch_size: int = 14
    mlp_ratio: int = 4
    eps: float = 1e-5
    dtype: str = "float32"
    attention: str = "auto"

    def __post_init__(self):
        if self.image_size % self.patch_size or self.dim % self.num_heads:
            raise ValueError(
                f"image_size={self.image_size} must be divisible by patch_size={self.patch_size}, "
                f"dim={self.dim} by num_heads={self.num_heads}"
            )

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


WAN_VAE = VAEConfig()
WAN22_VAE = VAEConfig(
    dim=160, z_dim=48, decoder_dim=256, patch_size=2, residual=True,
    mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
)  # fmt: skip
TAEW2_1 = TinyVAEConfig()
UMT5_XXL = UMT5Config(
    vocabulary=256384, dim=4096, attention_dim=4096, ffn_dim=10240, num_heads=64, num_layers=24, dtype="bfloat16"
)
CLIP_VIT_H = CLIPConfig(dim=1280, num_heads=16, num_layers=31)
