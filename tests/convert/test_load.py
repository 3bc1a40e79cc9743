"""From a file to a mesh, each device its own part."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.load import load_sharded
from rcm_jax.parallel import make_mesh, state_shardings
from rcm_jax.wan.networks import abstract_network
from tests.convert.tiny import T2V, save, wan_arrays


def test_every_device_gets_its_slice(tmp_path):
    source = open_checkpoint(save(tmp_path / "x.pt", wan_arrays(), "net."), num_heads=4)
    shardings = state_shardings(make_mesh(data=2, fsdp=4), abstract_network(T2V))
    params = load_sharded(source, shardings)
    flat = flatten_dict(params, sep="/")
    for name, tensor in source.ours().items():
        np.testing.assert_array_equal(flat[name], tensor.read())
    kernel = flat["blocks/ffn_in/kernel"]
    assert kernel.sharding == shardings["blocks"]["ffn_in"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 12, 64)}
    half = load_sharded(source, shardings, dtype="bfloat16")
    assert (half["blocks"]["ffn_in"]["kernel"].dtype, half["time_in"]["kernel"].dtype) == ("bfloat16", "float32")


def test_shardings_of_another_network(tmp_path):
    source = open_checkpoint(save(tmp_path / "x.pt", wan_arrays()), num_heads=4)
    shardings = state_shardings(make_mesh(), abstract_network(T2V))
    del shardings["head"]["out"]["bias"]
    with pytest.raises(ValueError, match=r"in one alone: \['head/out/bias'\]"):
        load_sharded(source, shardings)
    assert jax.tree.leaves(shardings)
