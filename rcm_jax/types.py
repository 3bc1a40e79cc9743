"""Axis letters and array aliases, the same in every file of the library.

====  ==========================================================
B     batch (videos)
T     latent frames
H W   latent rows, latent columns
C     latent channels
S     tokens of a video, ordered (frame, row, column)
N     attention heads
D     width: of a head in attention, of the model elsewhere
L     text tokens
F     pixel frames
====  ==========================================================

Arrays are channels-last. A velocity network is any callable ``(x_t, t) -> v`` with x_t and v [B, T, H, W, C] and t [B]
the rectified-flow time in [0, 1]; ``flow.py`` makes one from a DiT, its parameters and a text.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

Latents = Float[Array, "B T H W C"]
Video = Float[Array, "B F H W 3"]
Text = Float[Array, "B L D"]
Time = Float[Array, " B"]
Velocity = Callable[[Latents, Time], Latents]
Params = Any
Metrics = dict[str, Array]
