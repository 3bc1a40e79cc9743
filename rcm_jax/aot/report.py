"""What a compiled program takes on each of its GPUs, as data, as a page of text and as JSON."""

import dataclasses

from jax.sharding import Mesh

from rcm_jax.aot.collectives import Collective, collectives
from rcm_jax.aot.compile import Program
from rcm_jax.aot.costs import flops, kernels
from rcm_jax.aot.gpus import Gpu, usable
from rcm_jax.aot.hlo import read
from rcm_jax.aot.live import Buffer, live_at_peak

LARGEST = 10


@dataclasses.dataclass(frozen=True)
class Report:
    """Of one program on one of `devices` GPUs. Sizes in bytes, times in seconds.

    buffers: the largest of what is held where most is. flops: with the trips of its loops; those in `once` count once,
    since the compiler does not know their trips. kernels: how often each of our attention kernels runs.
    """

    name: str
    gpu: str
    devices: int
    mesh: dict[str, int]
    memory: int  # of the GPU
    arguments: int
    outputs: int
    temporaries: int
    peak: int
    buffers: list[Buffer]
    flops: float
    once: list[str]
    collectives: list[Collective]
    kernels: dict[str, int]
    compile_seconds: float

    @property
    def room(self) -> int:
        """Bytes of the GPU that a program may take."""
        return usable(self.memory)

    @property
    def fits(self) -> bool:
        return self.peak <= self.room

    @property
    def sent(self) -> int:
        return sum(c.bytes for c in self.collectives)

    @property
    def uncovered(self) -> float:
        """The part of the time of all collectives during which nothing computes."""
        total = sum(c.seconds for c in self.collectives)
        return sum(c.seconds * (1 - c.covered) for c in self.collectives) / total if total else 0.0

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | {"fits": self.fits, "sent": self.sent, "uncovered": self.uncovered}

    def text(self) -> str:
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        sizes = {"arguments": self.arguments, "outputs": self.outputs, "temporaries": self.temporaries}
        parts = ", ".join(f"{name} {gib(size)}" for name, size in sizes.items())
        lines = [
            f"{self.name} on {self.devices} x {self.gpu} ({mesh}), bytes and FLOPs of one GPU:",
            f"  peak         {gib(self.peak)} GiB of {gib(self.memory)} ({parts}): "
            + ("fits" if self.fits else f"DOES NOT FIT, {gib(self.room)} may be used"),
            f"  FLOPs        {self.flops:.3e}" + (f" (once: {', '.join(self.once)})" if self.once else ""),
            f"  attention    {', '.join(f'{name} x {n}' for name, n in self.kernels.items()) or 'none of our kernels'}",
            f"  compiled in  {self.compile_seconds:.0f} s",
            f"  sent         {gib(self.sent)} GiB, {self.uncovered:.0%} of its time not covered by compute",
        ]
        lines += [
            f"    {c.kind:18s} {'x'.join(c.axes) or '-':14s} {c.count:6d} times {gib(c.bytes):>8s} GiB "
            f"{1e3 * c.seconds:8.1f} ms, {c.covered:.0%} covered"
            for c in self.collectives
        ]
        lines.append("  largest arrays where most is held")
        lines += [f"    {gib(b.bytes):>8s} GiB  {b.shape:28s} {b.name}" for b in self.buffers]
        return "\n".join(lines)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def report(name: str, program: Program, mesh: Mesh, gpu: Gpu) -> Report:
    """What is known of a program that was compiled for that mesh of that GPU."""
    module = read(program.hlo)
    return Report(
        name=name,
        gpu=gpu.name,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        memory=gpu.memory,
        arguments=program.arguments,
        outputs=program.outputs,
        temporaries=program.temporaries,
        peak=program.peak,
        buffers=live_at_peak(module, program.live_ranges)[:LARGEST],
        flops=flops(module),
        once=module.unknown_trips(),
        collectives=collectives(module, dict(mesh.shape), gpu),
        kernels=dict(kernels(module)),
        compile_seconds=program.seconds,
    )
