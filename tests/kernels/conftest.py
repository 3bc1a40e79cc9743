import functools

import pytest

from rcm_jax.aot.compile import absent
from rcm_jax.kernels.attention import attention
from rcm_jax.parallel import make_mesh
from tests.kernels.attention_cases import BACKENDS


@pytest.fixture(params=BACKENDS)
def attend(request):
    return functools.partial(attention, implementation=BACKENDS[request.param])


@pytest.fixture(params=["xla", "blocks"])
def attend_xla(request):
    return functools.partial(attention, implementation=BACKENDS[request.param])


@pytest.fixture
def absent_mesh():
    """A mesh of one H100 that is not here, for tests marked `aot`."""
    try:
        return make_mesh(devices=absent("h100", 1))
    except RuntimeError as reason:  # no plugin, or another version's
        pytest.skip(str(reason))
