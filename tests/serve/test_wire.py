"""What readers may say."""

import json

import pytest

from rcm_jax.serve import wire


@pytest.mark.parametrize(
    "word",
    [
        wire.Open(prompt="a red circle", seed=3, num_steps=2, video=True),
        wire.Open(),
        wire.Say(prompt="", cut=True),
        wire.Change(noise_scale=1),
        wire.Pause(on=False),
        wire.More(chunks=9),
        wire.NoMoreVideo(),
        wire.Close(),
    ],
)
def test_what_is_written_is_read(word):
    assert wire.read(wire.written(word)) == word


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", 'whose "type" is one of open, say'),
        ('{"type": ["open"]}', 'whose "type" is one of open, say'),
        ('{"type": "shout"}', 'whose "type" is one of open, say'),
        ('{"type": "say"}', "prompt is missing"),
        ('{"type": "say", "prompt": 3}', "prompt must be text, not 3"),
        ('{"type": "more", "chunks": true}', "chunks must be a whole number, not True"),
        ('{"type": "change", "seed": 1.5}', "seed must be a whole number or null, not 1.5"),
        ('{"type": "close", "now": 1}', "'now' is nothing of that message; there are none"),
        ('{"type": "say", "prompt": "x", "' + "y" * 10_000 + '": 1}', "y… is nothing of that message"),
    ],
)
def test_what_may_not_be_said(text, message):
    with pytest.raises(wire.BadMessage, match=message) as error:
        wire.read(text)
    assert len(str(error.value)) < 200


def test_all_of_it_is_documented():
    told = json.loads(json.dumps(wire.documented()))
    assert set(told["you say"]) == set(wire.WORDS)
    assert all(about["about"] for about in told["you say"].values())
    assert told["you say"]["say"]["fields"] == {"prompt": "text", "cut": "true or false"}


def test_only_events_that_are_documented_are_said():
    assert json.loads(wire.event("want", frames=2)) == {"type": "want", "frames": 2}
    with pytest.raises(ValueError, match="kind='sing' must be one of waiting"):
        wire.event("sing")
