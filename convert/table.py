"""Applying a table of weight names, strictly, in both directions."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor: its PyTorch name, its path in our tree, and the change of layout.

    layout: "same"; "transpose" (Linear [out, in] to kernel [in, out]); "squeeze" (drops a leading axis of 1); any other
    name is looked up among the pairs of functions given to `to_ours` and `to_theirs`.
    """

    theirs: str
    ours: str
    layout: str = "same"

    @property
    def stacked(self) -> bool:
        return "{i}" in self.theirs


Layout = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]
LAYOUTS: dict[str, Layout] = {
    "same": (lambda x: x, lambda x: x),
    "transpose": (lambda x: x.T, lambda x: x.T),
    "squeeze": (lambda x: x[0], lambda x: x[None]),
}


def to_ours(rows: list[Row], tensors: Tensors, num_layers: int, layouts: Mapping[str, Layout]) -> dict[str, np.ndarray]:
    """PyTorch tensors to flat parameters {"blocks/self_attn/q/kernel": ...}; blocks stacked on a leading axis.

    Raises ValueError that lists every missing and every unused name: nothing is skipped.
    """
    layouts = LAYOUTS | dict(layouts)
    wanted = {row.theirs.format(i=i) for row in rows for i in range(num_layers if row.stacked else 1)}
    missing, unused = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    if missing or unused:
        raise ValueError(f"weights do not fit the network: missing {missing or 'none'}; not used {unused or 'none'}")

    def one(row: Row, name: str) -> np.ndarray:
        return layouts[row.layout][0](np.asarray(tensors[name]))

    def all_layers(row: Row) -> np.ndarray:
        if not row.stacked:
            return one(row, row.theirs)
        return np.stack([one(row, row.theirs.format(i=i)) for i in range(num_layers)])

    return {row.ours: np.ascontiguousarray(all_layers(row)) for row in rows}


def to_theirs(rows: list[Row], flat: Tensors, num_layers: int, layouts: Mapping[str, Layout]) -> dict[str, np.ndarray]:
    """The inverse of `to_ours`, as strict."""
    layouts = LAYOUTS | dict(layouts)
    wanted = {row.ours for row in rows}
    if wanted != set(flat):
        raise ValueError(
            f"parameters do not fit the table: missing {sorted(wanted - set(flat)) or 'none'}; "
            f"not used {sorted(set(flat) - wanted) or 'none'}"
        )
    out = {}
    for row in rows:
        layers = enumerate(flat[row.ours]) if row.stacked else [(0, flat[row.ours])]
        for i, value in layers:
            out[row.theirs.format(i=i)] = np.ascontiguousarray(layouts[row.layout][1](np.asarray(value)))
    if any(row.stacked and len(flat[row.ours]) != num_layers for row in rows):
        raise ValueError(f"stacked parameters do not hold {num_layers=} layers")
    return out
