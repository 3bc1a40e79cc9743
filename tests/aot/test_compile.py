from types import SimpleNamespace

import pytest

from rcm_jax.aot.compile import compile_for


class Asked(Exception):
    pass


def test_a_level_that_is_set_for_cpus_is_not_that_of_a_gpus_program():
    """As commands set one (`rcm_jax.xla_flags`): plans and the tests of kernels would be of code that no GPU runs."""

    def compile(compiler_options):
        raise Asked(compiler_options)

    function = SimpleNamespace(lower=lambda: SimpleNamespace(compile=compile))
    with pytest.raises(Asked) as asked:
        compile_for(function)
    (options,) = asked.value.args
    assert options["xla_backend_optimization_level"] == 3
