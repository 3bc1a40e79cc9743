"""What the server may be told, and its limits."""

import dataclasses
import ipaddress

from rcm_jax.errors import ArgumentError
from rcm_jax.options import check_options, option
from rcm_jax.ranges import at_least, between

LOCAL = ("localhost", "127.0.0.1", "::1")
SHORTEST_TOKEN = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Arguments of the server."""

    host: str = option("127.0.0.1", "address to listen at; any but this machine's own asks readers for --token")
    port: int = option(8000, "port to listen at; 0: any that is free", range=between(0, 65535))
    token: str | None = option(
        None, "what readers must know, as ?token=… (default: RCM_JAX_TOKEN of the environment; without it none here, a "
        "new one elsewhere)",
    )  # fmt: skip
    allow_origin: tuple[str, ...] = option(
        (), "pages of other sites that may use this server, like https://example.org", nargs="+", type=str
    )
    streams: int = option(4, "videos that are made at the same time", range=at_least(1))
    together: int | None = option(
        None, "of them in one pass of the network, at most (default: 16 of a small network, 1 of others, which fill a "
        "GPU alone)", range=at_least(1),
    )  # fmt: skip
    queue: int = option(32, "readers that may wait for one of them", range=at_least(0))
    connections: int = option(128, "of readers in all; more are refused", range=at_least(1))
    max_seconds: float = option(3600.0, "of video, after which a stream ends", range=at_least(1))
    idle_seconds: float = option(300.0, "without a word from its reader, after which it ends", range=at_least(1))
    max_prompt: int = option(1000, "characters of a prompt", range=at_least(1))
    max_frame: int = option(1 << 20, "bytes of a frame of input video, as JPEG, PNG or WebP", range=at_least(1024))
    messages: int = option(60, "a second from one reader, beside its frames", range=at_least(1))
    grace: float = option(10.0, "seconds to end streams in, when told to stop", range=at_least(0))

    def __post_init__(self) -> None:
        check_options(self)
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise ArgumentError(f"{{token}} must have at least {SHORTEST_TOKEN} characters", token=None)
        for origin in self.allow_origin:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ArgumentError("{allow_origin} must be like https://example.org", allow_origin=origin)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host in LOCAL
