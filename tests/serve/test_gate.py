"""Whose requests are heard."""

import pytest
from starlette.requests import HTTPConnection

from rcm_jax.errors import ArgumentError
from rcm_jax.serve.gate import Gate
from rcm_jax.serve.options import ServeOptions
from rcm_jax.serve.server import address, bound, token_of

HERE, TOKEN = "127.0.0.1:8000", "long-enough"


def refusal(gate, host=HERE, query="", **headers):
    pairs = [(b"host", host.encode()), *((k.encode(), v.encode()) for k, v in headers.items())]
    return gate.refusal(HTTPConnection({"type": "http", "headers": pairs, "query_string": query.encode()}))


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000"])
def test_this_machine_is_heard(host):
    assert refusal(Gate(ServeOptions(), None), host) is None
    assert refusal(Gate(ServeOptions(), None), host, origin=f"http://{host}") is None


@pytest.mark.parametrize(
    ("options", "asked", "why"),
    [
        ({}, dict(origin="https://evil.example"), "pages of another origin"),
        ({}, dict(origin="null"), "pages of another origin"),
        ({}, dict(origin="http://127.0.0.1:9000"), "pages of another origin"),  # another server of this machine
        ({}, dict(host="evil.example:8000"), "for its own machine"),  # a name that points here
        ({}, dict(host=""), "for its own machine"),
        ({"host": "0.0.0.0"}, dict(host="box:8000", query="token=wrong-one"), "a token is needed"),
        ({"host": "0.0.0.0"}, dict(host="box:8000", authorization="Bearer long-enoug"), "a token is needed"),
        ({"host": "0.0.0.0"}, dict(host="box:8000", authorization=f"Basic {TOKEN}"), "a token is needed"),
        ({"host": "0.0.0.0"}, dict(host="box:8000"), "a token is needed"),
    ],
)
def test_who_is_not_heard(options, asked, why):
    gate = Gate(ServeOptions(**options), TOKEN if options else None)
    assert why in refusal(gate, **asked)


@pytest.mark.parametrize("asked", [dict(query=f"token={TOKEN}"), dict(authorization=f"Bearer {TOKEN}")])
def test_a_token_opens(asked):
    assert refusal(Gate(ServeOptions(host="0.0.0.0"), TOKEN), "box:8000", **asked) is None


def test_an_origin_may_be_allowed():
    gate = Gate(ServeOptions(allow_origin=("https://example.org",)), None)
    assert refusal(gate, origin="https://example.org") is None
    assert refusal(gate, origin="https://example.org:8443") is not None


def test_a_token_of_the_environment(monkeypatch):
    monkeypatch.setenv("RCM_JAX_TOKEN", TOKEN)
    assert token_of(ServeOptions()) == token_of(ServeOptions(host="0.0.0.0")) == TOKEN
    assert token_of(ServeOptions(token="given-instead")) == "given-instead"
    with bound(ServeOptions(port=0)) as listener:  # what is printed goes into logs
        assert address(ServeOptions(), listener, TOKEN) == f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert address(ServeOptions(), listener, "given-instead").endswith("/?token=given-instead")
    monkeypatch.setenv("RCM_JAX_TOKEN", "short")
    with pytest.raises(ValueError, match="RCM_JAX_TOKEN in the environment must have at least 8 characters"):
        token_of(ServeOptions())
    monkeypatch.setenv("RCM_JAX_TOKEN", "")
    assert token_of(ServeOptions()) is None


def test_others_than_this_machine_always_need_a_token():
    assert token_of(ServeOptions()) is None
    made = {token_of(ServeOptions(host="0.0.0.0")) for _ in range(2)}
    assert len(made) == 2
    assert all(len(token) >= 20 for token in made)
    assert token_of(ServeOptions(host="::1", token=TOKEN)) == TOKEN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(token="short"), "token must have at least 8 characters"),
        (dict(allow_origin=("example.org",)), "allow_origin=example.org must be like https://example.org"),
        (dict(port=70000), "port=70000 must be"),
        (dict(streams=0), "streams=0 must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        ServeOptions(**options)
