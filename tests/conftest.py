"""Strict numerics for every test: eight CPU devices, no silent rank promotion, full float32 products."""

import os
import shutil
import tempfile
from importlib.metadata import version

# tests, their subprocesses and parallel workers compile the same programs many times
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rcm_jax_tests_")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    "--xla_cpu_parallel_codegen_split_count=1"
    # half the time of all tests where they are compiled unoptimised, as most are; later versions abort over it
    + " --xla_cpu_use_fusion_emitters=false"
    * version("jaxlib").startswith("0.10.")
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # see `as_compiled_for_users`


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the long tests and the slow proofs")
    parser.addoption("--long", action="store_true", help="run the long tests alone")
    parser.addoption("--aot", action="store_true", help="run alone the tests that compile for a GPU")


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        items[:] = [item for item in items if "long" in item.keywords]
    if config.getoption("--aot"):
        items[:] = [item for item in items if item.get_closest_marker("aot")]  # a folder has that name too
    has_gpu = any(d.platform == "gpu" for d in jax.devices())
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("aot") and not config.getoption("--aot"):
            item.add_marker(pytest.mark.skip(reason="compiles for a GPU: make test-gpu"))
        if "slow" in item.keywords and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="a slow proof: make test-full"))
        if "long" in item.keywords and not (config.getoption("--full") or config.getoption("--long")):
            item.add_marker(pytest.mark.skip(reason="a long test: make test-long"))


@pytest.fixture(autouse=True)
def as_compiled_for_users(request):
    """Most tests spend their time in the compiler, and unoptimised code is as right. Those that run for long, or are
    about what the compiler makes of a program, are marked `optimised`."""
    wanted = "optimised" in request.keywords
    if wanted:
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    if wanted:
        jax.config.update("jax_disable_most_optimizations", True)
