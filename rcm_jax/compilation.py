"""Compiled programs are kept on disk, so that the second run of a command starts at once.

RCM_JAX_CACHE=FOLDER moves them, RCM_JAX_CACHE=off keeps none; JAX's own JAX_COMPILATION_CACHE_DIR comes before both.
"""

import hashlib
import os
import platform
import sys
from pathlib import Path

MAX_BYTES = 4 << 30  # then what was not used for longest goes
MIN_SECONDS = 0.1  # what compiles faster than that is not kept


def cache_folder() -> Path | None:
    """Where programs are kept: a folder for each kind of CPU, since code for one may not run on another that shares the
    home directory. None where they are not."""
    chosen = os.environ.get("RCM_JAX_CACHE", "")
    if chosen.lower() in ("off", "0", "none"):
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rcm_jax"
    return (Path(chosen).expanduser() if chosen else base) / f"{platform.machine()}-{_cpu()}"


def _cpu() -> str:
    """A short name of what this CPU can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [f"flags: {platform.processor()}"]
    told = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def keep_programs() -> None:
    """From now on this process keeps what it compiles, and takes what is kept. For commands; a library's import should
    not decide this for others, so from Python it is called by those who want it."""
    import jax

    folder = cache_folder()
    if folder is None or jax.config.jax_compilation_cache_dir:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"warning: programs are not kept: {folder}: {error.strerror} (RCM_JAX_CACHE moves it)", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
