"""The worked examples of docs/CONTRIBUTING.md, as they stand there."""

import re
from pathlib import Path

import pytest

from rcm_jax.sampling.ode import SOLVERS

PAGE = (Path(__file__).parent.parent / "docs/CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", PAGE, re.S | re.M))


def test_every_part_has_an_example():
    assert list(EXAMPLES) == ["A loss", "A sampler", "A backend of attention", "A world"]
    assert PAGE.count("```python") == len(EXAMPLES)


@pytest.mark.parametrize("part", EXAMPLES)
def test_example(part, monkeypatch):
    monkeypatch.setattr("rcm_jax.sampling.ode.SOLVERS", SOLVERS | {})
    assert "assert " in EXAMPLES[part]
    exec(compile(EXAMPLES[part], part, "exec"), {"__name__": "example"})
