"""A run on several hosts: one process each, which find each other, agree, and end together.

`join_hosts` comes before anything of JAX. What the hosts tell each other before a program is compiled goes through the
store of JAX's coordinator; while the run lasts, a thread of each keeps its name fresh there, and looks for the others'.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rcm_jax.errors import ArgumentError
from rcm_jax.options import check_options, option
from rcm_jax.ranges import at_least

METHODS = {"slurm": "slurm", "mpi": "ompi", "k8s": "k8s", "none": None}  # ours: JAX's name of the same
GONE = 75  # exit code of a host that ends because another is gone: sysexits' "try again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostOptions:
    """How the processes of a run find each other. Without any of these a run has one."""

    hosts: str | None = option(
        None, "who started the processes and knows their addresses: slurm, mpi or k8s", choices=tuple(METHODS)
    )
    coordinator: str | None = option(None, "address and port of host 0, HOST:PORT, with --num_hosts and --host")
    num_hosts: int | None = option(None, "how many processes there are", range=at_least(1))
    host: int | None = option(None, "number of this one, from 0", range=at_least(0))
    host_timeout: int = option(300, "seconds to wait for the others at the start", range=at_least(1))
    host_lost_after: int = option(
        60, "seconds without a word after which a host counts as gone, and all others end", range=at_least(2)
    )

    def __post_init__(self) -> None:
        check_options(self)
        explicit = {name: getattr(self, name) for name in ("coordinator", "num_hosts", "host")}
        missing = [name for name, value in explicit.items() if value is None]
        if 0 < len(missing) < 3:
            raise ArgumentError(
                f"{{{missing[0]}}} is missing: coordinator, num_hosts and host go together",
                **{missing[0]: None},
            )
        if not missing and self.hosts:
            raise ArgumentError("{hosts} finds the others by itself: leave {coordinator} out", **self._two())
        if not missing and self.host >= self.num_hosts:
            raise ArgumentError(f"{{host}} must be 0 to {self.num_hosts - 1}", host=self.host)
        if not missing and not self.coordinator.rpartition(":")[2].isdigit():
            raise ArgumentError("{coordinator} must be HOST:PORT, like node001:1234", coordinator=self.coordinator)

    def _two(self) -> dict[str, Any]:
        return {"hosts": self.hosts, "coordinator": self.coordinator}


def join_hosts(options: HostOptions) -> None:
    """Joins the run's other processes, if it has any; before anything of JAX is computed.

    Raises RuntimeError where the coordinator does not answer or not all come in time.
    """
    if options.coordinator is None and options.hosts in (None, "none"):
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
        jax.distributed.initialize(**given, initialization_timeout=options.host_timeout)
    except Exception as error:
        first = " ".join(str(error).split())[:200]
        raise RuntimeError(
            f"the hosts did not find each other within host_timeout={options.host_timeout} seconds: {first}"
        ) from error
    threading.Thread(target=_watch, args=(options.host_lost_after,), daemon=True).start()


def _all_of_this_host() -> list[int] | None:
    """GPUs of a process that is alone on its host: JAX would give it one where a launcher numbers the processes. None
    leaves the choice to JAX."""
    alone = {os.environ.get(name) for name in ("SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")} == {None}
    alone = alone or "1" in (os.environ.get("SLURM_NTASKS_PER_NODE"), os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"))
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if alone and gpus.isdigit() else None


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


def _watch(lost_after: float) -> None:
    """Ends this process when another one has gone: it would wait for that one for ever."""
    store, me, count = _store(), jax.process_index(), jax.process_count()
    heard = {i: ("", time.monotonic()) for i in range(count) if i != me}
    beat, name = 0, socket.gethostname()
    while True:
        beat += 1
        try:
            store.key_value_set(f"rcm_jax/alive/{me}", f"{beat} {name}", allow_overwrite=True)
            words = {i: _try_get(store, f"rcm_jax/alive/{i}") for i in heard}
        except Exception as error:
            if _store() is None or "FAILED_PRECONDITION" in str(error):
                return  # the run is over
            _end(f"host 0, the coordinator, is gone ({' '.join(str(error).split())[:80]})")
        now = time.monotonic()
        for i, word in words.items():
            if word == "over":
                continue
            if word != heard[i][0]:
                heard[i] = (word, now)
            elif now - heard[i][1] > lost_after:
                known = word.partition(" ")[2] or "which never came"
                _end(f"host {i} ({known}) has not been heard of for {lost_after} seconds")
        time.sleep(min(1.0, lost_after / 4))


def _try_get(store: Any, key: str) -> str:
    try:
        return store.key_value_try_get(key)
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return ""
        raise


def _end(why: str) -> None:
    print(f"error: {why}; host {jax.process_index()} ends too, the newest checkpoint is where the run goes on",
          file=sys.stderr, flush=True)  # fmt: skip
    os._exit(GONE)
