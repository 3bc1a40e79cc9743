"""Applying a table of weight names, strictly, in both directions and without reading a number."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from rcm_jax.convert.tensors import Tensor
from rcm_jax.types import Params

Tensors = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor: its Wan2.1 name, its path in our tree, and the change of layout.

    A name with `{i}` is read for every layer and stacked on a leading axis. layout: "same"; "transpose" (Linear
    [out, in] to kernel [in, out]); "squeeze" (drops a leading axis of 1); any other name is looked up among the pairs
    of functions given besides the table.
    """

    theirs: str
    ours: str
    layout: str = "same"

    @property
    def stacked(self) -> bool:
        return "{i}" in self.theirs


Layout = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]


def pattern(theirs: str, ours: str) -> Layout:
    """A change of layout by its axes, in einops' terms, both ways."""
    return lambda x: rearrange(x, f"{theirs} -> {ours}"), lambda x: rearrange(x, f"{ours} -> {theirs}")


LAYOUTS: dict[str, Layout] = {
    "same": (lambda x: x, lambda x: x),
    "transpose": pattern("o i", "i o"),
    "squeeze": pattern("1 ...", "..."),
}


def _listed(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]" if names else "none"


def check_names(missing: Mapping[str, tuple | None], unused: Mapping[str, tuple]) -> None:
    """Raises ValueError that lists every missing and every unused name, with its shape where it is known."""
    if missing or unused:
        lists = (
            _listed([k if v is None else f"{k} {v}" for k, v in sorted(names.items())]) for names in (missing, unused)
        )
        raise ValueError("weights do not fit the network: missing {}; not used {}".format(*lists))


def lazy_to_ours(
    rows: Sequence[Row], tensors: Mapping[str, Tensor], num_layers: int, layouts: Mapping[str, Layout] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Wan2.1-named tensors to ours, {"blocks/self_attn/q/kernel": [layers, in, out]}, unread.

    shapes: what our tree has at each path. Raises ValueError listing missing, unused and misshapen tensors.
    """
    layouts = LAYOUTS | dict(layouts or {})
    shapes = shapes or {}
    names = {row: [row.theirs.format(i=i) for i in range(num_layers if row.stacked else 1)] for row in rows}

    def their_shape(row: Row) -> tuple[int, ...] | None:
        if row.ours not in shapes:
            return None
        shape = shapes[row.ours][1:] if row.stacked else shapes[row.ours]
        return layouts[row.layout][1](np.broadcast_to(np.zeros((), np.uint8), shape)).shape

    wanted = {name: row for row, all_names in names.items() for name in all_names}
    check_names(
        {name: their_shape(row) for name, row in wanted.items() if name not in tensors},
        {tensors[name].origin or name: tensors[name].shape for name in set(tensors) - set(wanted)},
    )
    out, problems = {}, []
    for row, layers in names.items():
        found = []
        for name in layers:
            try:
                tensor = tensors[name].apply(layouts[row.layout][0])
            except ValueError as error:
                problems.append(str(error))
                continue
            shape = shapes.get(row.ours, tensor.shape)
            if tensor.shape != (shape[-len(tensor.shape) :] if row.stacked else shape):
                problems.append(f"{tensors[name].origin or name} {tensors[name].shape}, expected {their_shape(row)}")
            found.append(tensor)
        if not problems:
            out[row.ours] = Tensor.stack(found) if row.stacked else found[0]
    if problems:
        raise ValueError("weights have other shapes than the network:\n  " + "\n  ".join(problems))
    return out


def lazy_to_theirs(
    rows: Sequence[Row], flat: Mapping[str, Tensor], num_layers: int, layouts: Mapping[str, Layout] | None = None
) -> dict[str, Tensor]:
    """The inverse of `lazy_to_ours`, as strict."""
    layouts = LAYOUTS | dict(layouts or {})
    wanted = {row.ours for row in rows}
    check_names(
        dict.fromkeys(wanted - set(flat)), {name: flat[name].shape for name in set(flat) - wanted}
    )  # fmt: skip
    odd = [row.ours for row in rows if row.stacked and flat[row.ours].shape[0] != num_layers]
    if odd:
        raise ValueError(f"stacked parameters do not hold {num_layers=} layers: {odd}")
    out = {}
    for row in rows:
        for i in range(num_layers if row.stacked else 1):
            tensor = flat[row.ours].layer(i) if row.stacked else flat[row.ours]
            out[row.theirs.format(i=i)] = tensor.apply(layouts[row.layout][1])
    return out


def to_ours(rows: Sequence[Row], tensors: Tensors, num_layers: int, layouts: Mapping[str, Layout]) -> Params:
    """PyTorch-named arrays to a tree of parameters, in memory. Raises as `lazy_to_ours`."""
    lazy = {name: Tensor.of(array, name) for name, array in tensors.items()}
    flat = lazy_to_ours(rows, lazy, num_layers, layouts)
    return unflatten_dict({name: t.read() for name, t in flat.items()}, sep="/")


def to_theirs(rows: Sequence[Row], params: Params, num_layers: int, layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """The inverse of `to_ours`, as strict."""
    lazy = {name: Tensor.of(array, name) for name, array in flatten_dict(params, sep="/").items()}
    return {name: t.read() for name, t in lazy_to_theirs(rows, lazy, num_layers, layouts).items()}
