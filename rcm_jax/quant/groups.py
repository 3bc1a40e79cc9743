"""Keys or values [B, S, N, D] as rows of groups that share a scale, and back."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

Heads = Float[Array, "B S N D"]
Groups = Float[Array, "rows groups size"]
Shape = tuple[int, int, int, int]

# the axes of [B, S, N, D] in the order in which a row is read, and how many of them choose the row
ORDER = {
    "token": ((0, 1, 2, 3), 3),
    "channel": ((0, 2, 3, 1), 3),
    "head": ((0, 2, 1, 3), 2),
    "tensor": ((0, 1, 2, 3), 1),
}


def group_shape(shape: Shape, granularity: str, group_size: int) -> tuple[int, int, int]:
    """Rows, groups in a row, numbers in a group; the last group of a row may be padded."""
    order, outer = ORDER[granularity]
    sizes = [shape[axis] for axis in order]
    rows, length = math.prod(sizes[:outer]), math.prod(sizes[outer:])
    size = group_size if 0 < group_size < length else length
    return rows, -(-length // size), size


def shared_by(shape: Shape, granularity: str, group_size: int) -> tuple[int, int] | None:
    """Of how many tokens, and of how many channels of each one's head, the numbers are that share a scale; None where
    groups are cut otherwise. What is padded may be short of tokens."""
    _, _, heads, width = shape
    _, _, size = group_shape(shape, granularity, group_size)
    if granularity == "channel":
        return size, 1
    if width % size == 0:
        return 1, size
    token = heads * width if granularity == "tensor" else width
    return None if size % token else (size // token, width)


def to_groups(x: Heads, granularity: str, group_size: int) -> Groups:
    """Rows padded with zeros to whole groups."""
    rows, groups, size = group_shape(x.shape, granularity, group_size)
    x = x.transpose(ORDER[granularity][0]).reshape(rows, -1)
    return jnp.pad(x, ((0, 0), (0, groups * size - x.shape[1]))).reshape(rows, groups, size)


def from_groups(x: Groups, shape: Shape, granularity: str) -> Heads:
    """The inverse of `to_groups`."""
    order, _ = ORDER[granularity]
    length = math.prod(shape) // x.shape[0]
    x = x.reshape(x.shape[0], -1)[:, :length].reshape([shape[axis] for axis in order])
    return x.transpose([order.index(axis) for axis in range(4)])
