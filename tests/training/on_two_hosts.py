"""Every step of every objective as one of two processes:

    python -m tests.training.on_two_hosts OUT CUTS COORDINATOR HOST

The first process writes OUT/NAME.STEP.npz: the leaves of the state and the metrics after the step. Compared with one
device by test_mesh.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from rcm_jax.parallel import batch_sharding, local_rows, make_mesh, place_batch, sharded_attention, state_shardings
from rcm_jax.training.host_options import HostOptions
from rcm_jax.training.hosts import hosts_of_a_run
from rcm_jax.training.step import make_steps
from tests.training.test_mesh import MESHES, STEPS, arguments, run_config


def placed(tree, mesh):
    """Arrays that every process has whole, on the mesh of all."""

    def place(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, state_shardings(mesh, tree))


def main(out, cuts, coordinator, host):
    with hosts_of_a_run(HostOptions(coordinator=coordinator, num_hosts=2, host=int(host))):
        mesh = make_mesh(**MESHES["all three"])
        assert len({d.process_index for d in mesh.devices.flat}) == 2
        for name, step in STEPS:
            config = run_config(name, int(cuts))
            state, networks, (batch, _), null_text = arguments(config)
            rows = local_rows(batch_sharding(mesh), config.data.batch_size)
            assert len(rows) == config.data.batch_size // 2, "a host reads its half"
            own = jax.tree.map(lambda x, rows=rows: x[rows.start : rows.stop], batch)
            with jax.set_mesh(mesh):
                run = make_steps(config, null_text, sharded_attention(mesh))[step]
                after = run(
                    placed(state, mesh), placed(networks, mesh),
                    place_batch(own, batch_sharding(mesh), rows, config.data.batch_size),
                )  # fmt: skip
            leaves = jax.tree.leaves(multihost_utils.process_allgather(after, tiled=True))
            if jax.process_index() == 0:
                np.savez(Path(out) / f"{name}.{step}.npz", **{str(i): x for i, x in enumerate(leaves)})


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)  # as in conftest: compiling is nearly all of the time
    main(*sys.argv[1:])
