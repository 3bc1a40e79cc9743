"""Where a run begins: from what it is given, or from a checkpoint of its workdir."""

import warnings
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from rcm_jax.errors import ArgumentError
from rcm_jax.parallel import state_shardings
from rcm_jax.training.checkpoint import Checkpoints, DamagedError, abstract_like
from rcm_jax.training.config import RunConfig
from rcm_jax.training.state import Start, TrainState, abstract_state, first_state
from rcm_jax.version import code_version


def parse_resume(resume: str | int) -> str | int:
    """ "auto", "no" or a step. Raises ArgumentError for anything else."""
    if resume in ("auto", "no"):
        return resume
    if not str(resume).isdigit():
        raise ArgumentError("{resume} must be auto, no, or the step of a checkpoint", resume=resume)
    return int(resume)


def check_data(then: Mapping[str, Any], now: Mapping[str, Any], run: str) -> None:
    """Raises ValueError where the data are not those that a checkpoint was trained on: its position would be another
    sample's."""
    then = {name: value for name, value in then.items() if name != "position"}
    if then == dict(now):
        return
    counts = [f"{then.get(name)} {name} then, {now.get(name)} now" for name in ("shards", "samples")]
    differ = [line for line, name in zip(counts, ("shards", "samples"), strict=True) if then.get(name) != now.get(name)]
    raise ValueError(
        f"{run} was trained on other data ({'; '.join(differ) or 'as many samples, of other names or sizes'}): put the "
        "set back as it was; or train on this one in a new workdir, from the weights that the old one has"
    )


def open_state(
    config: RunConfig, weights: Start, mesh: Mesh, checkpoints: Checkpoints | None, resume: str | int = "auto",
    data: Mapping[str, Any] | None = None,
) -> TrainState:  # fmt: skip
    """The state that a run goes on from, sharded over the mesh: the newest checkpoint's, or that of step `resume`, or
    the first one.

    data: what the source says of itself; a checkpoint's must be the same. Raises ValueError where it is not;
    DamagedError that names the newest checkpoint that is whole; ArgumentError for a step that is not there, and for
    resume "no" where there are checkpoints.
    """
    steps, resume = checkpoints.steps() if checkpoints else [], parse_resume(resume)
    if resume == "no" and steps:
        raise ArgumentError(
            f"{{resume}}: {checkpoints.folder} has checkpoints up to step {steps[-1]}; use a new workdir", resume=resume
        )
    if isinstance(resume, int) and resume not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ArgumentError(f"{{resume}}: there is no such checkpoint; the workdir has {there}", resume=resume)
    if not steps:
        return first_state(config, weights, mesh)
    like = abstract_like(abstract_state(config), state_shardings(mesh, abstract_state(config)))
    step = resume if isinstance(resume, int) else steps[-1]
    try:
        about = checkpoints.about(step)
        check_data(about["data"], data or {}, f"step {step} of {checkpoints.folder.parent}")
        state = checkpoints.restore(step, like)[0]
    except DamagedError as error:
        whole = checkpoints.whole_before(step, like)
        way = "no older one is whole" if whole is None else f"step {whole} is whole: --resume={whole} goes on from it"
        raise DamagedError(f"{error}; {way}") from error
    if about["code"] != code_version():
        warnings.warn(f"step {step} was saved by other code, {about['code']}; this is {code_version()}", stacklevel=2)
    for place in checkpoints.set_aside(after=step):
        warnings.warn(f"a checkpoint beyond step {step} was moved to {place}", stacklevel=2)
    return state
