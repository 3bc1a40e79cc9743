"""Plans of runs: the steps of a config compiled for GPUs that are not here, and the search for what fits them."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax

from rcm_jax.aot.compile import GPUS_A_HOST, absent, compile_for
from rcm_jax.aot.gpus import Gpu, usable
from rcm_jax.aot.report import Report, gib, report
from rcm_jax.parallel import MESH_AXES, bytes_per_device, make_mesh, mesh_shape
from rcm_jax.training.abstract import abstract_networks, abstract_steps
from rcm_jax.training.config import RunConfig
from rcm_jax.training.loop import check_batch
from rcm_jax.training.schedule import step_names
from rcm_jax.training.state import abstract_state
from rcm_jax.wan.config import REMAT


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config's steps on so many GPUs. `reason` says why nothing was compiled, where that was plain before."""

    config: RunConfig
    gpus: int
    reports: tuple[Report, ...] = ()
    reason: str = ""

    @property
    def fits(self) -> bool:
        return bool(self.reports) and all(r.fits for r in self.reports)

    @property
    def peak(self) -> int:
        return max((r.peak for r in self.reports), default=0)

    def settings(self) -> str:
        """What it changes of a recipe, as flags."""
        mesh, config = self.config.mesh, self.config
        return (
            f"--mesh fsdp={mesh.fsdp} sequence={mesh.sequence} --gpus {self.gpus} "
            f"--config.microbatches={config.microbatches} --config.model.remat={config.model.remat}"
        )

    def text(self) -> str:
        return "\n\n".join(r.text() for r in self.reports)

    def to_dict(self) -> dict:
        return {
            "config": self.config.to_dict(), "gpus": self.gpus, "fits": self.fits, "reason": self.reason,
            "steps": [r.to_dict() for r in self.reports],
        }  # fmt: skip


def parse_mesh(words: Sequence[str]) -> dict[str, int]:
    """["fsdp=8", "sequence=2"], or both in a word, as numbers. Raises ValueError for what is no axis or number."""
    sizes = {}
    for word in (part for w in words for part in w.split(",") if part):
        axis, _, size = word.partition("=")
        if axis not in MESH_AXES or not size.lstrip("-").isdigit():
            raise ValueError(f"--mesh {word}: give AXIS=N for axes of {', '.join(MESH_AXES)}, as in fsdp=8 sequence=2")
        sizes[axis] = int(size)
    return sizes


def mesh_size(config: RunConfig, count: int | None) -> int:
    """How many GPUs the run is planned for: those that were asked for, else the product of its mesh."""
    mesh = config.mesh
    count = count or max(1, mesh.data) * mesh.fsdp * mesh.sequence
    mesh_shape(mesh.data, mesh.fsdp, mesh.sequence, count)  # its errors
    return count


def plan(
    config: RunConfig, gpu: Gpu, count: int | None = None, *, step: str | None = None,
    told: Callable[[Report], object] = lambda report: None,
) -> Plan:  # fmt: skip
    """Compiles the run's steps, or one, for `count` GPUs. `told` gets each report when it is there.

    Raises ValueError for a step that the run does not have, for a mesh that does not multiply to the GPUs and for a
    batch that it does not divide; RuntimeError without the compiler's plugin.
    """
    names, count = step_names(config.method), mesh_size(config, count)
    if step is not None and step not in names:
        raise ValueError(f"--step={step} is no step of this run; it has {', '.join(names)}")
    check_batch(config, count)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence, absent(gpu, count))
    reports = []
    with jax.set_mesh(mesh):
        steps, arguments = abstract_steps(config, mesh)
        for name in names if step is None else (step,):
            reports.append(report(name, compile_for(steps[name], *arguments), mesh, gpu))
            told(reports[-1])
    return Plan(config, count, tuple(reports))


# --- what fits ------------------------------------------------------------------------------------------------------


def search(
    config: RunConfig, gpu: Gpu, count: int | None = None, *, step: str | None = None,
    told: Callable[[str], object] = lambda line: None,
) -> list[Plan]:  # fmt: skip
    """Tries ways to run a recipe on `count` GPUs, those that compute and send least first, until one fits with all
    its steps; all that were tried. The batch stays; its cuts are one video a GPU. `told` gets a line for each."""
    plans = []
    for changed in candidates(config, mesh_size(config, count)):
        plans.append(_tried(changed, gpu, mesh_size(config, count), step))
        told(row(plans[-1]))
        if plans[-1].fits:
            break
    return plans


SEARCHED = tuple(remat for remat in REMAT if remat != "dots")  # on GPUs it keeps nearly what "none" does


def candidates(config: RunConfig, count: int) -> Iterator[RunConfig]:
    """The configs that `search` tries, the cheapest first: saving more comes before computing it again, few GPUs a
    video before many, weights shared within a host before all GPUs share them."""
    heads, batch = config.model.num_heads, config.data.batch_size
    for remat in SEARCHED:
        for sequence in (n for n in (1, 2, 4, 8) if count % n == 0 and heads % n == 0 and batch % (count // n) == 0):
            rest = count // sequence
            for fsdp in dict.fromkeys((math.gcd(GPUS_A_HOST, rest), rest)):
                mesh = dataclasses.replace(config.mesh, data=rest // fsdp, fsdp=fsdp, sequence=sequence)
                model = dataclasses.replace(config.model, remat=remat)
                yield dataclasses.replace(config, mesh=mesh, model=model, microbatches=batch // rest)


def _tried(config: RunConfig, gpu: Gpu, count: int, step: str | None) -> Plan:
    """Compiled, the step that needs most first, and the others only if it fits; not compiled where a bound says no."""
    least, room = at_least_bytes(config, count), usable(gpu.memory)
    if least > room:
        return Plan(config, count, reason=f"at least {gib(least)} GiB")
    names = step_names(config.method) if step is None else (step,)
    reports: tuple[Report, ...] = ()
    for name in sorted(names, key=lambda name: ("dmd" not in name, name)):
        reports += plan(config, gpu, count, step=name).reports
        if not reports[-1].fits:
            break
    return Plan(config, count, reports)


def at_least_bytes(config: RunConfig, count: int) -> int:
    """Fewer bytes than a step takes on a GPU: the state, the networks that stand still, and of one backward pass what
    `remat` keeps of every layer: its input; with "attention" what attention gave; with "dots" or "none" at least six
    arrays more and the feed-forward's."""
    mesh, model = config.mesh, config.model
    shape = mesh_shape(mesh.data, mesh.fsdp, mesh.sequence, count)
    state = abstract_state(config)
    abstract = jax.sharding.AbstractMesh(shape, MESH_AXES)
    held = sum(bytes_per_device(abstract, x) for x in (state, abstract_networks(config)))
    samples = config.data.batch_size // config.microbatches // (count // mesh.sequence)
    tokens = samples * math.prod(model.grid(config.data.latent_shape)) // mesh.sequence
    widths = {"block": 1, "attention": 2}.get(model.remat, 6 + model.ffn_dim / model.dim)
    itemsize = 2 if model.dtype == "bfloat16" else 4
    return held + round(widths * model.num_layers * tokens * model.dim * itemsize)


def what_fits(config: RunConfig, gpu: Gpu, count: int | None, failed: Plan) -> str:
    """For one that does not fit: the flags of a way that does, on as many GPUs or on more."""
    count = mesh_size(config, count)
    for more in (count, 2 * count, 4 * count):
        resized = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=-1, fsdp=more, sequence=1))
        plans = search(resized, gpu, more)
        if plans and plans[-1].fits:
            return f"{plans[-1].settings()} would, at {gib(plans[-1].peak)} GiB"
    return f"nothing that was tried does, on up to {4 * count} GPUs; {gib(failed.peak)} GiB are needed on {count}"


HEADER = f"{'data':>5} {'fsdp':>5} {'seq':>4} {'cuts':>5} {'remat':10} {'GiB':>7} {'PFLOP':>7} {'sent GiB':>9}  fits"


def row(plan: Plan) -> str:
    """A line of `table`."""
    mesh, config = plan.config.mesh, plan.config
    start = f"{mesh.data:5d} {mesh.fsdp:5d} {mesh.sequence:4d} {config.microbatches:5d} {config.model.remat:10}"
    if not plan.reports:
        return f"{start} {plan.reason}: not compiled"
    most = max(plan.reports, key=lambda r: r.peak)
    said = "yes" if plan.fits else f"no: {most.name}"
    return f"{start} {gib(plan.peak):>7} {most.flops / 1e15:7.2f} {gib(most.sent):>9}  {said}"


def table(plans: Sequence[Plan]) -> str:
    """What was tried, and the flags of what fits."""
    lines = [HEADER, *map(row, plans)]
    lines += [f"fits: {p.settings()}" for p in plans if p.fits] or ["nothing fits: take more GPUs, or larger ones"]
    return "\n".join(lines)
