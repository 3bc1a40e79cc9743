"""A page on which a causal network's video plays while it is made: python -m rcm_jax.serve

Without a file it is the built-in student, which a laptop streams many times faster than it plays. The prompt, the seed,
the steps and the policy of the cache may change while it plays; a camera or a file may be repainted; what has played
can be saved. Programs use the same server: GET /api says how, `rcm_jax.serve.client` is a client in Python.

It listens to this machine alone. With --host 0.0.0.0 readers need the token that it prints.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rcm_jax.cli import command_parser, one_line_errors

if TYPE_CHECKING:
    import socket

    from rcm_jax.serve.engine import Engine
    from rcm_jax.serve.options import ServeOptions


def parser() -> argparse.ArgumentParser:
    from rcm_jax.options import add_options
    from rcm_jax.pipelines.kinds import BIDIRECTIONAL
    from rcm_jax.pipelines.options import OF_ONE_VIDEO, FileOptions, SamplingOptions
    from rcm_jax.serve.options import ServeOptions

    p = command_parser("serve", __doc__)
    add_options(p, ServeOptions)
    sampling = [f for f in SamplingOptions.__dataclass_fields__ if f not in (*OF_ONE_VIDEO, "num_frames")]
    add_options(p.add_argument_group("how to sample"), SamplingOptions, names=sampling, without=[BIDIRECTIONAL])
    add_options(p.add_argument_group("files and devices"), FileOptions, without=[BIDIRECTIONAL])
    return p


def checked(args: argparse.Namespace) -> "tuple[ServeOptions, dict[str, Any], dict[str, Any]]":
    """The server's limits, how to sample, and the files. Raises for arguments that do not go together, and for what is
    missing on this machine."""
    from rcm_jax.options import taken
    from rcm_jax.pipelines.options import FileOptions, SamplingOptions
    from rcm_jax.serve.options import ServeOptions

    given = vars(args)
    limits, options = ServeOptions(**taken(given, ServeOptions)), taken(given, SamplingOptions)
    SamplingOptions(**options)
    files = {"dit_path": "toy_causal"} | taken(given, FileOptions)
    FileOptions(**files)
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"serving needs {error.name}: pip install 'rcm_jax[serve]'") from None
    from rcm_jax.media.video import check_encoder

    check_encoder()
    return limits, options, files


def started(limits: "ServeOptions", options: dict[str, Any], files: dict[str, Any]) -> "Engine":
    """The engine, loaded, compiled and running."""
    from rcm_jax.pipelines.live import endless_policy
    from rcm_jax.pipelines.pipeline import load
    from rcm_jax.serve.engine import Engine

    pipe = load(**files)
    if pipe.causal and not (pipe.info.causal.get("window") or "window" in options or "cache_policy" in options):
        options = endless_policy(pipe.info) | options
    engine = Engine(pipe, limits, options)
    engine.start()
    return engine


def prepared(args: argparse.Namespace) -> "tuple[Engine, socket.socket, str | None]":
    """The engine, ready; where it will be listened; and the token. What is wrong with them, or with the port, is raised
    before anything is loaded."""
    limits, options, files = checked(args)
    from rcm_jax.serve.server import bound, token_of

    token, listener = token_of(limits), bound(limits)
    print("loading and compiling …", file=sys.stderr)
    return started(limits, options, files), listener, token


def main(argv: Sequence[str] | None = None) -> None:
    """The command; installed as rcm-serve."""
    args = parser().parse_args(argv)
    with one_line_errors():
        engine, listener, token = prepared(args)
        from rcm_jax.serve.server import address, run

        listener.listen(128)  # who reads the address may come at once
        print(address(engine.limits, listener, token), flush=True)
        run(engine, listener, token)
        if engine.compiling:  # Python would wait for a program that nobody needs any more
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


if __name__ == "__main__":
    main()
