import jax
import pytest


@pytest.fixture(autouse=True)
def default_precision():
    """As users compile: the other tests' full float32 products would be three each."""
    with jax.default_matmul_precision(None):
        yield
