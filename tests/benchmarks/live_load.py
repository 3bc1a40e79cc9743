"""Many readers of one server on this machine.

    python -m tests.benchmarks.live_load together [--readers 16] [--chunks 200]
    python -m tests.benchmarks.live_load passes [--readers 16] [--chunks 20]
    python -m tests.benchmarks.live_load churn [--connections 1000] [--minutes 10]

together    so many readers at once, each of whom takes what it gets: chunks a second of all, with the streams batched
            and with each by itself, in turn, and whether every stream is whole
passes      the network and the decoder alone, without server and readers: seconds for a chunk of each of so many videos
churn       readers that come, watch a few chunks and go, some in the middle of one: the server's memory over time
"""

import argparse
import functools
import io
import json
import random
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import av
import jax
from websockets.exceptions import ConnectionClosed

import rcm_jax
from rcm_jax.pipelines.live import Live, advance, endless_policy
from rcm_jax.serve.client import StreamEnded, open_stream
from tests.benchmarks import time_in_turn
from tests.serve.test_main import Command

PROMPTS = ("a red circle moving left", "a blue square moving up", "a green circle moving right")


def at_once(count: int, work: Callable[[int], object]) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def torn(parts: list[bytes], frames: int) -> bool:
    """Whether a stream is not the frames that its chunks have."""
    with av.open(io.BytesIO(b"".join(parts))) as file:
        return len(list(file.decode(video=0))) != frames


def together(url: str, readers: int, chunks: int) -> dict[str, float]:
    """Chunks a second of all readers, after the first ones of each; how many streams were torn or dropped."""
    begins, ends, bad = [0.0] * readers, [0.0] * readers, []
    ready = threading.Barrier(readers)

    def read(i: int) -> None:
        try:
            with open_stream(url, prompt=PROMPTS[i % 3], seed=i, more=4) as stream:
                parts = [stream.next(120) for _ in range(8)]
                ready.wait(240)
                begins[i] = time.monotonic()
                parts += [stream.next(120) for _ in range(chunks)]
                ends[i] = time.monotonic()
            seconds = parts[-1].start + parts[-1].seconds
            if torn([part.video for part in parts], round(seconds * stream.opened["fps"])):
                bad.append(i)
        except (StreamEnded, TimeoutError, AttributeError, threading.BrokenBarrierError):
            bad.append(i)

    at_once(readers, read)
    return {"chunks_a_second": readers * chunks / (max(ends) - min(begins)), "torn_or_dropped": len(bad)}


def measured(readers: int, chunks: int) -> dict[str, dict[str, float]]:
    """Batched and one by one, each in a server of its own, twice and in turn."""
    out: dict[str, list] = {"together": [], "one by one": []}
    for _ in range(2):
        for name, flags in (("together", ()), ("one by one", ("--together", "1"))):
            with Command("--streams", str(readers), *flags) as server:
                together(server.url, readers, 20)  # passes of larger sizes are compiled beside it
                time.sleep(30 if name == "together" else 0)
                out[name].append(together(server.url, readers, chunks))
    return out


def passes(readers: int, chunks: int) -> dict[str, float]:
    """Median seconds for a chunk of each, in one pass and one after the other, in turn."""
    pipe = rcm_jax.load("toy_causal")
    options = endless_policy(pipe.info)
    sizes = {"together": tuple(range(readers, 0, -1)), "one by one": (1,)}
    lives = {name: [Live(pipe, PROMPTS[i % 3], seed=i, **options) for i in range(readers)] for name in sizes}

    def chunk(name: str) -> None:
        jax.block_until_ready([part.frames for part in advance(lives[name], sizes[name])])

    for name in sizes:  # every kind of chunk is compiled
        chunk(name), chunk(name)
    functions = {name: functools.partial(chunk, name) for name in sizes}
    return {name: statistics.median(times) for name, times in time_in_turn(functions, chunks, 1).items()}


def memory(url: str) -> float:
    """MiB that the server uses."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return (
        next(float(line.split()[1]) for line in text.splitlines() if line.startswith("rcm_jax_memory_bytes ")) / 2**20
    )


def churn(connections: int, minutes: float) -> dict[str, list]:
    """Memory after each tenth of the connections."""
    dice, seen, gone, lock = random.Random(0), [], [0], threading.Lock()
    end, every = time.monotonic() + 60 * minutes, max(1, connections // 20)

    def come(_: int) -> None:
        while True:
            with lock:
                if gone[0] >= connections and time.monotonic() >= end:
                    return
                gone[0] += 1
                number, chunks, rude = gone[0], dice.randrange(1, 8), dice.random() < 0.3
            try:
                with open_stream(server.url, prompt=PROMPTS[number % 3], seed=number) as stream:
                    for _ in range(chunks):
                        stream.next(60)
                    if rude:
                        stream.abandon()
            except (StreamEnded, ConnectionClosed, TimeoutError, OSError):
                pass
            if number % every == 0:
                with lock:
                    seen.append((number, round(memory(server.url), 1)))
                    print(number, seen[-1][1], flush=True)
            time.sleep(max(0.0, 60 * minutes * 8 / connections - 0.1) * dice.random() * 2)

    with Command("--streams", "4", "--num_steps", "1") as server:
        at_once(8, come)
        time.sleep(2)
        health = json.loads(urllib.request.urlopen(f"{server.url}/health").read())
    return {"connections": gone[0], "memory": seen, "streams_left": health["streams"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("together", "passes", "churn"))
    parser.add_argument("--readers", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=200, help="of each reader")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    args = parser.parse_args()
    if args.what == "churn":
        found = churn(args.connections, args.minutes)
    else:
        found = {"together": measured, "passes": passes}[args.what](args.readers, args.chunks)
    print(json.dumps(found, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
