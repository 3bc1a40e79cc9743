"""Metrics of every step to metrics.jsonl, and to TensorBoard and Weights & Biases where wanted."""

import json
from pathlib import Path

import jax

from rcm_jax.types import Metrics


def read_metrics(workdir: str | Path) -> list[dict]:
    """All records of a run, one a step."""
    file = Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class MetricsWriter:
    """Holds metrics on the device until `flush`, so that logging does not make the host wait for every step.

    Opened for a run that resumes at `start`, it drops the records from there on: they will be made again.
    """

    def __init__(self, workdir: Path, start: int, *, tensorboard: bool = False, wandb: str = ""):
        kept = [r for r in read_metrics(workdir) if r["step"] < start]
        self._path = workdir / "metrics.jsonl"
        self._path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._waiting: list[tuple[int, str, Metrics]] = []
        self._board = self._wandb = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # slow to import, and a demo does without

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)
        if wandb:
            try:
                import wandb as client
            except ImportError as error:
                raise RuntimeError(f"wandb={wandb!r} needs the extra: pip install 'rcm_jax[wandb]'") from error
            self._wandb = client.init(project=wandb, dir=str(workdir), resume="allow", id=workdir.name)

    def add(self, step: int, kind: str, metrics: Metrics) -> None:
        """Metrics of one step; `kind` says which networks it trained."""
        self._waiting.append((step, kind, metrics))

    def flush(self) -> dict:
        """Writes what is waiting; returns the newest record."""
        record = {}
        with self._path.open("a") as file:
            for step, kind, metrics in jax.device_get(self._waiting):
                record = {"step": step, "kind": kind} | {k: v.item() for k, v in metrics.items()}
                file.write(json.dumps(record) + "\n")
                scalars = {k: v for k, v in record.items() if k not in ("step", "kind")}
                for name, value in scalars.items() if self._board else ():
                    self._board.add_scalar(name, value, step)
                if self._wandb:
                    self._wandb.log(scalars, step=step)
        self._waiting.clear()
        return record

    def close(self) -> None:
        self.flush()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()
