"""What was measured: one line of JSON a row, written as soon as it is known, and the table and the picture of them."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from rcm_jax.kernels.bench_shapes import PRODUCTS

KEY = ("device", "jax", "code", "shape", "pass", "peer", "dtype")  # rows that agree in these measure the same


class Records:
    """A file of JSON lines, or nothing on disk for None; what it holds already is not measured again.

    key: fields by which rows are told apart. result: the field that a row has once it is measured.
    """

    def __init__(self, path: Path | None, key: tuple[str, ...] = KEY, result: str = "ms"):
        self._path, self._names, self._result = path, key, result
        self._rows = list(_read(path)) if path is not None and path.exists() else []

    def find(self, row: dict) -> dict | None:
        """The last row with the same key that was measured, not left out."""
        return next((r for r in reversed(self._rows) if self._result in r and self._key(r) == self._key(row)), None)

    def add(self, row: dict) -> None:
        """Writes the row whole, in one go, and to the disk. A row that says why nothing was measured is kept once."""
        said = (r.get("reason") for r in self._rows if self._key(r) == self._key(row))
        if self._result not in row and row.get("reason") in said:
            return
        self._rows.append(row)
        if self._path is None:
            return
        with open(self._path, "ab+") as file:
            torn = file.tell() and not _ends_a_line(file)
            file.write(b"\n" * bool(torn) + json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _key(self, row: dict) -> tuple:
        return tuple(row.get(name) for name in self._names)


def _ends_a_line(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _read(path: Path) -> Iterable[dict]:
    """The rows; a line that was cut off when a run was killed is passed over."""
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


HEADER = (
    f"{'shape':12} {'pass':15} {'peer':20} {'ms':>10} {'TFLOP/s':>9} {'share':>6} {'temp MiB':>9} "
    f"{'error':>8} {'worst row':>9} {'xla has':>8}  clock"
)


def line(row: dict) -> str:
    """A row of the table; of several results the worst."""
    start = f"{row['shape']:12} {row['pass']:15} {row['peer']:20}"
    if "reason" in row:
        return f"{start} left out: {row['reason']}"
    memory = row.get("temporary MiB")
    error, worst = (max(pair[i] for pair in row["errors"].values()) for i in (0, 1))
    xla = max(pair[0] for pair in row["errors of xla"].values())
    tiles = f"  {row['tiles']}" if "tiles" in row else ""
    return (
        f"{start} {row['ms']:10.3f} {row['TFLOP/s']:9.1f} {row['share']:6.0%} "
        f"{'' if memory is None else f'{memory:.0f}':>9} {error:8.1e} {worst:9.1e} {xla:8.1e}  {row['clock']}{tiles}"
    )


def plot(rows: list[dict], out: Path) -> None:
    """TFLOP/s of every pass and peer under the roof, a panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if "ms" in r]
    shapes, peers = (list(dict.fromkeys(r[name] for r in rows)) for name in ("shape", "peer"))
    size = (1 + 4 * max(1, len(shapes)), 3.6)
    figure, axes = plt.subplots(1, max(1, len(shapes)), figsize=size, squeeze=False, layout="constrained")
    for axis, shape in zip(axes[0], shapes, strict=False):
        here = [r for r in rows if r["shape"] == shape]
        kinds = [kind for kind in PRODUCTS if any(r["pass"] == kind for r in here)]
        for i, peer in enumerate(peers):
            rates = {r["pass"]: r["TFLOP/s"] for r in here if r["peer"] == peer}
            at = [kinds.index(kind) + (i - len(peers) / 2) * 0.8 / len(peers) for kind in rates]
            axis.bar(at, list(rates.values()), 0.8 / len(peers), label=peer, color=f"C{i}", align="edge")
        axis.axhline(max(r["roof TFLOP/s"] for r in here), color="black", lw=1, ls="--", label="matrix product")
        axis.set(title=shape, xticks=range(len(kinds)), ylabel="TFLOP/s")
        axis.set_xticklabels(kinds, rotation=15)
    if shapes:
        axes[0][-1].legend(fontsize="x-small")
    figure.savefig(out, dpi=120)
    plt.close(figure)
