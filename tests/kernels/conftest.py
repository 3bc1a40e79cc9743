import functools

import pytest

from rcm_jax.kernels.attention import attention
from tests.kernels.attention_cases import BACKENDS


@pytest.fixture(params=BACKENDS)
def attend(request):
    return functools.partial(attention, implementation=BACKENDS[request.param])


@pytest.fixture(params=["xla", "blocks"])
def attend_xla(request):
    return functools.partial(attention, implementation=BACKENDS[request.param])
