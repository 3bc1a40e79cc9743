"""The networks of a pipeline: where their weights come from, and which of them serves which noise."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rcm_jax.convert.checkpoint import Checkpoint
from rcm_jax.convert.load import load_params
from rcm_jax.parallel import MESH_AXES, sharded_attention
from rcm_jax.types import Params
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.dit import DiT


def mesh_of(params: Params) -> Mesh | None:
    """The mesh of ours over which weights are sharded; None of weights that lie on no mesh."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if mesh is not None and set(MESH_AXES) <= set(mesh.axis_names) else None


class Experts:
    """One network, or Wan2.2's two: the first where the RF time is at least `boundary`, the second below.

    Weights are read when they are first asked for. With `keep_all` both stay loaded once they are; else the one that is
    not asked is freed.
    """

    def __init__(self, sources: Sequence[Checkpoint], config: DiTConfig, mesh: Mesh, *, dtype: str, boundary: float):
        self.sources, self.mesh, self.dtype, self.boundary, self.keep_all = sources, mesh, dtype, boundary, False
        self.dit = DiT(config, attend=sharded_attention(mesh))
        self._loaded: dict[int, Params] = {}

    @classmethod
    def of(cls, params: Params, config: DiTConfig, mesh: Mesh) -> "Experts":
        """One network whose weights are there already, as they lie."""
        self = cls((), config, mesh, dtype="keep", boundary=0.0)
        self._loaded[0] = params
        return self

    def params(self, t: float = 1.0) -> Params:
        """The weights that serve RF time t."""
        index = 0 if len(self.sources) < 2 or t >= np.float32(self.boundary) else 1  # times are float32
        if index not in self._loaded:
            if not self.keep_all:
                self._loaded.clear()
            self._loaded[index] = load_params(self.sources[index], self.mesh, dtype=self.dtype)
        return self._loaded[index]

    def release(self) -> None:
        """Frees what can be read again."""
        if self.sources:
            self._loaded.clear()
