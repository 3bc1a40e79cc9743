"""A run on several hosts: one process each, which find each other, agree, and end together.

`join_hosts` comes before anything of JAX. What the hosts tell each other before a program is compiled goes through the
store of JAX's coordinator; while the run lasts, a thread of each keeps its name fresh there, and looks for the others'.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rcm_jax.errors import Interrupted
from rcm_jax.training.host_options import METHODS, HostOptions

LEAVING = 20  # seconds to wait for the others at the end
GONE = 75  # exit code of a host that ends because another is gone: sysexits' "try again"


def join_hosts(options: HostOptions) -> None:
    """Joins the run's other processes, if it has any; before anything of JAX is computed.

    Raises RuntimeError where the coordinator does not answer or not all come in time.
    """
    if options.coordinator is None and options.hosts is None:
        return
    jax.config.update("jax_enable_preemption_service", False)  # signals are ours: `loop.StopSignal`
    given: dict[str, Any] = {"local_device_ids": _all_of_this_host()}
    if options.coordinator is not None:
        if options.host:
            _answers(options.coordinator, options.host_timeout)
        given |= {
            "coordinator_address": options.coordinator, "num_processes": options.num_hosts,
            "process_id": options.host, "cluster_detection_method": "deactivate",
        }  # fmt: skip
    else:
        given["cluster_detection_method"] = METHODS[options.hosts]
    try:
        jax.distributed.initialize(
            **given, initialization_timeout=options.host_timeout, shutdown_timeout_seconds=LEAVING,
            heartbeat_timeout_seconds=max(100, 3 * options.host_lost_after),  # ours first: it says which host
        )  # fmt: skip
    except Exception as error:
        first = " ".join(str(error).split())[:200]
        raise RuntimeError(
            f"the hosts did not find each other within host_timeout={options.host_timeout} seconds: {first}"
        ) from error
    threading.Thread(target=_watch, args=(options.host_lost_after,), daemon=True).start()


@contextlib.contextmanager
def hosts_of_a_run(options: HostOptions) -> Iterator[None]:
    """Around a run: joins its hosts. Where this one fails, it says why, all others end with its words, and so does the
    process: at its end JAX would wait for hosts that are gone."""
    join_hosts(options)
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except Interrupted:  # all stop at the same step
        _say(OVER)
        raise
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError):  # perhaps of a connection: `_watch` knows whose, and ends us
            time.sleep(options.host_lost_after + 2 * BEAT)
        with contextlib.suppress(Exception):
            _say(f"{FAILED} {' '.join(str(error).split())[:500]}")
        time.sleep(2 * BEAT)  # until all have heard
        if os.environ.get("RCM_JAX_DEBUG"):
            traceback.print_exc()
        _leave(str(error), 1)
    wait_for_all("the end of the run")
    _say(OVER)


def _all_of_this_host(gpus: Path = Path("/proc/driver/nvidia/gpus")) -> list[int] | None:
    """GPUs of a process that is alone on its host: JAX would give it one where a launcher numbers the processes. None
    leaves the choice to JAX.

    gpus: a folder with an entry for each GPU, as NVIDIA's driver has it.
    """
    processes = (os.environ.get(name, "1") for name in ("SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"))
    if any(count != "1" for count in processes):
        return None
    visible, given = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("SLURM_GPUS_ON_NODE", "")
    if visible is not None:
        count = len([name for name in visible.split(",") if name])
    else:
        count = int(given) if given.isdigit() else len([*gpus.glob("*")])
    return list(range(count)) or None


def _answers(address: str, patience: float) -> None:
    """Returns when something listens at the address: JAX itself would abort the process."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"the coordinator at {address} does not answer after host_timeout={patience} seconds "
                    f"({error.strerror or error}): is host 0 running, and the port open?"
                ) from error
            time.sleep(0.5)


# --- before a program is compiled: through the coordinator's store ---------------------------------------------------


def _store() -> Any:
    """The client of JAX's coordinator, which JAX does not export, though Orbax and others live by it."""
    from jax._src import distributed

    return distributed.global_state.client


_exchanges = iter(range(1 << 62))


def exchange(text: str, patience: float = 600.0) -> list[str]:
    """What every process gives, by its number. All must call it, in the same order."""
    if jax.process_count() == 1:
        return [text]
    store, key = _store(), f"rcm_jax/exchange/{next(_exchanges)}"
    store.key_value_set(f"{key}/{jax.process_index()}", text or " ")
    return [
        store.blocking_key_value_get(f"{key}/{i}", round(1000 * patience)).removeprefix(" ")
        for i in range(jax.process_count())
    ]


def wait_for_all(what: str) -> None:
    """Until every process is here."""
    exchange(what)


@contextlib.contextmanager
def on_first(what: str) -> Iterator[bool]:
    """`with on_first("write") as mine: if mine: …`: where the block raises on the first process, all others raise
    RuntimeError with its words, so that none waits for it."""
    mine, trouble = jax.process_index() == 0, ""
    try:
        yield mine
    except Exception as error:
        trouble = f"{type(error).__name__}: {error}"
        raise
    finally:
        told = exchange(trouble)[0]
    if told and not mine:
        raise RuntimeError(f"{what}: host 0 says {told}")


def check_same(describe: Callable[[dict, dict, str, str], Sequence[str]], config: dict, code: str) -> None:
    """Raises ValueError on every host where one has another config or other code than host 0.

    describe: a line for each setting that two configs do not share, named as theirs and ours.
    """
    mine = json.dumps({"config": config, "code": code, "name": socket.gethostname()})
    all_hosts = [json.loads(text) for text in exchange(mine)]
    first = all_hosts[0]
    for i, other in enumerate(all_hosts):
        who = f"host {i} ({other['name']})"
        if other["code"] != first["code"]:
            raise ValueError(f"{who} runs other code, {other['code']}, than host 0 ({first['name']}), {first['code']}")
        if differ := describe(other["config"], first["config"], f"on host {i}", "on host 0"):
            raise ValueError(f"{who} has another config than host 0 ({first['name']}): {'; '.join(differ)}")


# --- while the run lasts --------------------------------------------------------------------------------------------


class Agreement:
    """Whether any host wants to stop, known to all at the same step, and without waiting for a program: what a host
    says at one step all know at the next."""

    def __init__(self, mesh: Mesh):
        self._flags = NamedSharding(mesh, P(mesh.axis_names))
        self._size = mesh.size
        self._any = jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, P()))
        self._before: jax.Array | None = None

    def __call__(self, mine: bool) -> bool:
        if jax.process_count() == 1:
            return mine
        flags = jax.make_array_from_callback((self._size,), self._flags, lambda _: np.array([mine]))
        before, self._before = self._before, self._any(flags)
        return before is not None and bool(before)


OVER, FAILED, BEAT = "over", "failed", 1.0


def _say(word: str) -> None:
    _store().key_value_set(f"rcm_jax/alive/{jax.process_index()}", word, allow_overwrite=True)


def _watch(lost_after: float) -> None:
    """Ends this process when another one has gone: it would wait for that one for ever."""
    store, me, count = _store(), jax.process_index(), jax.process_count()
    heard = {i: ("", time.monotonic()) for i in range(count) if i != me}
    name = socket.gethostname()
    for beat in itertools.count():
        try:
            said = _try_get(store, f"rcm_jax/alive/{me}")
            if said == OVER or said.startswith(FAILED):
                return
            store.key_value_set(f"rcm_jax/alive/{me}", f"{beat} {name}", allow_overwrite=True)
            words = {i: _try_get(store, f"rcm_jax/alive/{i}") for i in heard}
        except Exception as error:
            _end(f"host 0, the coordinator, is gone ({' '.join(str(error).split())[:80]})")
        now = time.monotonic()
        for i, word in words.items():
            if word.startswith(FAILED):
                _end(f"host {i} says: {word.removeprefix(FAILED).strip()}")
            if word != heard[i][0]:
                heard[i] = (word, now)
            elif word != OVER and now - heard[i][1] > lost_after:
                known = word.partition(" ")[2] or "which never came"
                _end(f"host {i} ({known}) has not been heard of for {lost_after} seconds")
        time.sleep(min(BEAT, lost_after / 4))


def _try_get(store: Any, key: str) -> str:
    try:
        return store.key_value_try_get(key)
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return ""
        raise


def _end(why: str) -> None:
    me = jax.process_index()
    _leave(f"{why}; host {me} ends too, and the run goes on from its newest checkpoint when it is started again", GONE)


def _leave(words: str, code: int) -> None:
    print(f"error: {words}", file=sys.stderr, flush=True)
    os._exit(code)
