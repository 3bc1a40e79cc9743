"""How the processes of a run find each other: flags, read before anything of JAX is imported."""

import dataclasses
from typing import Any

from rcm_jax.errors import ArgumentError
from rcm_jax.options import check_options, option
from rcm_jax.ranges import at_least

METHODS = {"slurm": "slurm", "mpi": "ompi", "k8s": "k8s"}  # ours: JAX's name of the same


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
