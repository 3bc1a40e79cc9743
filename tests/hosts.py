"""Runs of several processes on this machine, each with some CPU devices: `python -m rcm_jax.train` as on hosts."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RECIPE = Path(__file__).parent / "tiny_recipe.py"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    here = os.pathsep.join(filter(None, [str(RECIPE.parent.parent), os.environ.get("PYTHONPATH", "")]))
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "RCM_JAX_CACHE": "off", "PYTHONPATH": here}
    return os.environ | quiet | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def start(
    teacher: Path, workdir: Path, *flags: str, hosts: int = 1, devices: int = 8, name: str = ""
) -> list[subprocess.Popen]:
    """One process a host, which share `devices`; their output goes to WORKDIR.HOST.txt, or to `name` beside it."""
    common = [sys.executable, "-m", "rcm_jax.train", f"--config={RECIPE}:{teacher}", f"--workdir={workdir}", *flags]
    port, processes = free_port(), []
    for i in range(hosts):
        own = [f"--coordinator=127.0.0.1:{port}", f"--num_hosts={hosts}", f"--host={i}"] if hosts > 1 else []
        with said(workdir.with_name(name) if name else workdir, i).open("w") as out:
            processes.append(
                subprocess.Popen([*common, *own], env=environment(devices // hosts), stdout=out, stderr=out)
            )
    return processes


def said(workdir: Path, host: int = 0) -> Path:
    return workdir.with_name(f"{workdir.name}.{host}.txt")


def finish(processes: Sequence[subprocess.Popen], timeout: float = 300) -> list[int]:
    """Their exit codes; none is left behind."""
    try:
        return [p.wait(timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
