"""A stage is a list of parts; each is recorded as it ends, so that a stage that was stopped goes on where it was."""

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from rcm_jax.kernels import bench_clock
from rcm_jax.kernels.bench_records import Records

KEY = ("stage", "part", "tiny", "device", "jax", "code")


@dataclasses.dataclass(frozen=True)
class Context:
    """What every stage is told. out: where results go. rcm: a checkout of rCM's published code, for its kernel."""

    out: Path
    tiny: bool = False
    rcm: Path | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """run: gives what is recorded, plain numbers and words; `ok` among them says whether it passed, if it can fail."""

    name: str
    run: Callable[[], dict[str, Any]]


def run_parts(stage: int, parts: Iterable[Part], context: Context) -> bool:
    """Runs what is not recorded yet; prints a line a part. False where one failed: it is run again the next time."""
    path = context.out / f"stage{stage}.jsonl"
    records = Records(path, KEY, "result")
    machine = bench_clock.machine()
    print(f"stage {stage}: {', '.join(f'{name} {value}' for name, value in machine.items())}", flush=True)
    good = True
    for part in parts:
        row = {"stage": stage, "part": part.name, "tiny": context.tiny, **machine}
        if kept := records.find(row):
            print(f"  {part.name:28} {words(kept['result'])}  (from {path})")
            continue
        began = time.perf_counter()
        try:
            result = part.run()
        except Exception as error:  # one part must not take the others' hour
            traceback.print_exc()
            result = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        row["seconds"] = round(time.perf_counter() - began, 1)
        if result.get("ok", True):
            records.add(row | {"result": result})
        else:
            good = False
            records.add(row | {"reason": result})
        print(f"  {part.name:28} {words(result)}  ({row['seconds']} s)", flush=True)
    return good


def words(result: dict[str, Any]) -> str:
    """One line of a result."""
    return ", ".join(f"{name} {_number(value)}" for name, value in result.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def peak_gib() -> float | None:
    """Highest memory of this process on the first device so far; None where the device does not count it."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None
