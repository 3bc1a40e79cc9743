"""Whose requests are heard: a token where others than this machine can reach the server, and no foreign pages."""

import hmac
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from rcm_jax.serve.options import LOCAL, ServeOptions


class Gate:
    """token: what must be known; None: nothing."""

    def __init__(self, limits: ServeOptions, token: str | None):
        self.limits, self.token = limits, token

    def refusal(self, request: HTTPConnection) -> str | None:
        """Why a request is not heard; None: it is."""
        host = request.headers.get("host", "")
        if self.limits.local and urlsplit(f"//{host}").hostname not in LOCAL:
            return "this server is for its own machine"  # a name that somebody points at it is not its own
        origin = request.headers.get("origin")
        if origin is not None and origin not in self.limits.allow_origin and urlsplit(origin).netloc != host:
            return "pages of another origin are not heard; --allow_origin names those that are"
        if self.token is not None and not hmac.compare_digest(self._given(request).encode(), self.token.encode()):
            return "a token is needed, and this is not it: ?token=…, as the server printed it"
        return None

    @staticmethod
    def _given(request: HTTPConnection) -> str:
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        return value if scheme.lower() == "bearer" else request.query_params.get("token", "")
