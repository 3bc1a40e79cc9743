"""What Wan's video autoencoders are built of: layers over frames, of which some keep the last ones that they saw.

Such a layer's state is a variable `past` in flax's collection "cache", of one shape for every step; a video's first
frame is a step of its own, which some layers treat apart (`first`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from rcm_jax.kernels.attention import attention
from rcm_jax.kernels.target import target
from rcm_jax.wan.config import VAEConfig

Frames = Float[Array, "B F H W C"]


def by_channel(values, dtype=None) -> Float[Array, "1 1 1 1 C"]:
    return jnp.asarray(values, dtype)[None, None, None, None]


def after_past(module: nn.Module, x: Frames, length: int) -> Frames:
    """x behind the `length` frames before it, which the module's cache keeps: zeros when a video starts."""
    past = module.variable("cache", "past", jnp.zeros, (x.shape[0], length, *x.shape[2:]), x.dtype)
    x = jnp.concatenate([past.value, x], axis=1)
    past.value = x[:, -length:]
    return x


class Norm(nn.Module):
    """x / |x| · sqrt(C) · scale over the channels, the length in float32."""

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y * jax.lax.rsqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), 1e-24)) * x.shape[-1] ** 0.5
        return (y * by_channel(scale)).astype(x.dtype)


Kernel = Float[Array, "f h w C D"]


def solid(x: Frames, kernel: Kernel, stride: int = 1) -> Frames:
    """Convolution over (frame, row, column), `stride` in time, without padding in time."""
    sides = [(side // 2, side // 2) for side in kernel.shape[1:3]]
    axes = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, 1, 1), [(0, 0), *sides], dimension_numbers=axes)


def planes(x: Frames, kernel: Kernel, stride: int = 1) -> Frames:
    """`solid` as the sum of a convolution in the plane for each frame that the kernel sees."""
    seen = kernel.shape[0]
    last = (x.shape[1] - seen) // stride * stride  # the first frame that the last output frame sees
    parts = [rearrange(x[:, i : i + last + 1 : stride], "b f h w c -> (b f) h w c") for i in range(seen)]
    axes = ("NHWC", "HWIO", "NHWC")
    y = sum(
        jax.lax.conv_general_dilated(part, kernel[i], (1, 1), "SAME", dimension_numbers=axes)
        for i, part in enumerate(parts)
    )
    return rearrange(y, "(b f) h w c -> b f h w c", b=x.shape[0])


def convolve(x: Frames, kernel: Kernel, stride: int = 1) -> Frames:
    """In the form that is the faster one where it is compiled for: a CPU's own 3-D convolution is the slower."""
    return (solid if target().is_gpu else planes)(x, kernel, stride)


class Conv3D(nn.Module):
    """Convolution over (frame, row, column), without padding in time."""

    features: int
    size: tuple[int, int, int] = (3, 3, 3)
    stride: int = 1  # in time

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        shape = (*self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return convolve(x, kernel, self.stride) + by_channel(bias)


class CausalConv(nn.Module):
    """3 × 3 × 3: a frame and the two before it."""

    features: int

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        return Conv3D(self.features, name="conv")(after_past(self, x, 2))


class ResidualBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        h = CausalConv(self.features, name="conv_in")(nn.silu(Norm(name="norm_in")(x)))
        h = CausalConv(self.features, name="conv_out")(nn.silu(Norm(name="norm_out")(h)))
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=x.dtype, name="shortcut")(x)
        return x + h


class FrameAttention(nn.Module):
    """Every pixel of a frame attends to all pixels of that frame; one head."""

    implementation: str

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        _, F, H, _, C = x.shape
        qkv = nn.Dense(3 * C, dtype=x.dtype, name="qkv")(Norm(name="norm")(x))
        q, k, v = jnp.split(rearrange(qkv, "b f h w d -> (b f) (h w) 1 d"), 3, axis=-1)
        o = attention(q, k, v, implementation=self.implementation)
        o = rearrange(o, "(b f) (h w) 1 d -> b f h w d", f=F, h=H)
        return x + nn.Dense(C, dtype=x.dtype, name="out")(o)


class Middle(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        x = ResidualBlock(x.shape[-1], name="block_in")(x)
        x = FrameAttention(self.config.attention, name="attention")(x)
        return ResidualBlock(x.shape[-1], name="block_out")(x)


class Downsample(nn.Module):
    """Halves height and width, with `temporal` also time; a video's first frame has no partner and passes."""

    temporal: bool
    first: bool

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        C = x.shape[-1]
        x = nn.Conv(C, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=x.dtype, name="space")(x)
        if not self.temporal:
            return x
        both = after_past(self, x, 1)
        if self.first:
            return x
        return Conv3D(C, (3, 1, 1), stride=2, name="time")(both)


class Upsample(nn.Module):
    """Doubles height and width, with `temporal` also time but for the first frame."""

    features: int
    temporal: bool
    first: bool

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        C = x.shape[-1]
        if self.temporal and self.first:
            after_past(self, x[:, :0], 2)  # the first frame is no part of the past: the next one sees zeros before it
        elif self.temporal:
            pairs = Conv3D(2 * C, (3, 1, 1), name="time")(after_past(self, x, 2))
            x = rearrange(pairs, "b f h w (pair c) -> b (f pair) h w c", pair=2)
        x = x.repeat(2, axis=2).repeat(2, axis=3)
        return nn.Conv(self.features, (3, 3), dtype=x.dtype, name="space")(x)


PATCH = "b f (h y) (w x) c -> b f h w (c x y)"


def to_patches(video: Frames, side: int) -> Frames:
    """The pixels of a square as channels of one: colours first, then columns, then rows."""
    return video if side == 1 else rearrange(video, PATCH, x=side, y=side)


def from_patches(x: Frames, side: int) -> Frames:
    """The inverse of `to_patches`."""
    pixels, channels = PATCH.split(" -> ")
    return x if side == 1 else rearrange(x, f"{channels} -> {pixels}", x=side, y=side)


BLOCK = "b (f t) (h y) (w x) c -> b f h w (c t y x)"


def averaged(x: Frames, features: int, *, time: int, space: int) -> Frames:
    """Each block of `time` frames and `space` rows and columns as one pixel of `features` means of its numbers. Before
    an odd frame, a video's first, there are zeros."""
    numbers = time * space**2 * x.shape[-1]
    if numbers % features:
        raise ValueError(f"a shortcut cannot average {numbers} numbers to {features} features")
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, BLOCK, t=time, y=space, x=space)
    return x.reshape(*x.shape[:-1], features, -1).mean(-1)


def repeated(x: Frames, features: int, *, time: int, space: int, first: bool) -> Frames:
    """Each pixel as a block of `time` frames and `space` rows and columns, its numbers several times in a row; of a
    video's `first` frame the last of the `time`."""
    block, one = BLOCK.split(" -> ")
    numbers = time * space**2 * features
    if numbers % x.shape[-1]:
        raise ValueError(f"a shortcut cannot make {numbers} numbers of {x.shape[-1]}")
    x = x.repeat(numbers // x.shape[-1], axis=-1)
    x = rearrange(x, f"{one} -> {block}", t=time, y=space, x=space)
    return x[:, time - 1 :] if first else x
