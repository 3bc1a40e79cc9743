"""Ten thousand chunks of the built-in world, under every policy of the cache: is a stream's memory and time flat?

    python -m tests.benchmarks.long_stream [--chunks 10000] [--json OUT]

Of each tenth of the stream: seconds a chunk (median), the process's resident memory at its end, bytes of all arrays
that JAX holds, and programs compiled after the first tenth. A policy runs in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests import benchmarks
from tests.benchmarks.policies_over_time import POLICIES


def one(name: str, chunks: int) -> list[dict]:
    """A row for each tenth."""
    import jax

    import rcm_jax
    from rcm_jax.chunks import ChunkPattern

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    pipe = rcm_jax.load("toy_causal")
    frames = ChunkPattern.parse(pipe.info.causal["pattern"]).start(chunks)
    stream = pipe.stream(num_frames=frames, cache_policy=name.split(",")[0], **POLICIES[name])
    rows, seconds, start = [], [], time.perf_counter()
    for i, _ in enumerate(stream, 1):
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
        if i % (chunks // 10) == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
            arrays = sum(x.nbytes for x in jax.live_arrays())
            rows.append({"seconds": statistics.median(seconds), "resident": resident, "arrays": arrays,
                         "compiled": len(compiled)})  # fmt: skip
            seconds = []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), metavar="POLICY",
                        default=[name for name in POLICIES if name != "none"])  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.chunks)))
        return
    rows = {}
    print("| policy | ms a chunk, 2nd and last tenth | resident MiB | arrays MiB | compiled after the 1st tenth |")
    print("|---|---|---|---|---|")
    for name in args.policies:
        command = [sys.executable, "-m", "tests.benchmarks.long_stream", "--one", name, "--chunks", str(args.chunks)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows[name] = tenths = json.loads(told.splitlines()[-1])
        first, second, last = tenths[0], tenths[1], tenths[-1]
        mib = [f"{second[n] / 2**20:.1f}, {last[n] / 2**20:.1f}" for n in ("resident", "arrays")]
        print(
            f"| {name} | {1e3 * second['seconds']:.2f}, {1e3 * last['seconds']:.2f} | {mib[0]} | {mib[1]} "
            f"| {last['compiled'] - first['compiled']} |", flush=True,
        )  # fmt: skip
    benchmarks.write_json(args.json, {"machine": benchmarks.machine("jax", "jaxlib"), "rows": rows})


if __name__ == "__main__":
    main()
