"""What a run starts from: anybody's files, checked before anything is read, on the mesh in the precision they need."""

import dataclasses
import importlib
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.convert import load
from rcm_jax.convert.dit import to_wan
from rcm_jax.convert.tensors import Tensor
from rcm_jax.data.config import DataConfig
from rcm_jax.model_file import ModelInfo, save_model
from rcm_jax.objectives.config import CausalConfig
from rcm_jax.parallel import make_mesh, state_shardings
from rcm_jax.training.abstract import abstract_networks
from rcm_jax.training.info import fake_info, model_info
from rcm_jax.training.runs import WeightFiles, train_recipe
from rcm_jax.training.state import Weights, first_state
from tests.convert.test_torch_io import Evil, zip_with
from tests.convert.tiny import T2V, random_params, save
from tests.tiny import MODEL, perturbed_params, tiny_run

DMD = {"consistency": "", "tangent_warmup": 0}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 8, 1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A PyTorch file in Wan2.1's names."""
    return str(save(tmp_path_factory.mktemp("teacher") / "x.pt", to_wan(random_params(T2V), T2V), "net."))


def wan_run(teacher, **changes):
    return tiny_run(**{"model": T2V, "teacher": teacher} | changes)


def test_a_teacher_is_anybodys_file_in_the_precision_it_computes_in(teacher, mesh):
    config = wan_run(teacher)
    found = WeightFiles(config).networks(config, mesh)
    assert found.score_teacher is None
    kernel = found.teacher["blocks"]["self_attn"]["q"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert kernel.addressable_shards[0].data.shape == (3, 48 // 8, 48)
    assert found.teacher["head"]["modulation"].dtype == jnp.float32
    wanted = random_params(T2V)["blocks"]["self_attn"]["q"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(kernel, wanted)
    planned = abstract_networks(config)
    jax.tree.map(lambda x, plan: np.testing.assert_equal((x.shape, x.dtype), (plan.shape, plan.dtype)), found, planned)
    exact = dataclasses.replace(config, teacher_dtype="float32")
    assert {x.dtype for x in jax.tree.leaves(WeightFiles(exact).networks(exact, mesh))} == {np.dtype("float32")}


def test_only_what_a_loss_reads_is_loaded(teacher, mesh, monkeypatch):
    read = []
    monkeypatch.setattr("rcm_jax.training.runs.load_params", lambda source, *_, **how: read.append(str(source.path)))

    def networks(**changes):
        read.clear()
        config = wan_run(teacher, **changes)
        found = WeightFiles(config).networks(config, mesh)
        planned = abstract_networks(config)
        return len(read), planned.teacher is not None, planned.score_teacher is not None, found

    assert networks()[:3] == (1, True, False)
    assert networks(method=DMD, score_teacher=teacher)[:3] == (1, False, True)
    assert networks(score_teacher=teacher)[:3] == (2, True, True)
    assert networks(method={"name": "diffusion"})[:3] == (0, False, False)


def test_the_toy_recipes_teachers_stay_exact(mesh):
    from rcm_jax.configs import base, toy_rcm

    config = base.run_config(toy_rcm.get_config())
    assert {str(x.dtype) for x in jax.tree.leaves(abstract_networks(config))} == {"float32"}
    found = WeightFiles(config).networks(config, mesh)
    assert {str(x.dtype) for x in jax.tree.leaves(found)} == {"float32"}


def buffers(tree):
    return [shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) for shard in x.addressable_shards]


@pytest.mark.parametrize("files", [True, False])
def test_the_first_state_is_sharded_and_no_two_buffers_are_one(tmp_path, mesh, files):
    given = perturbed_params(MODEL)
    info = ModelInfo(MODEL, "teacher", "toy", (9, 6, 6))
    config = tiny_run(teacher=str(save_model(tmp_path / "t.safetensors", given, info)))
    weights = WeightFiles(config) if files else Weights(teacher=given)
    with jax.set_mesh(mesh):
        state = first_state(config, weights, mesh)
    for tree in (state.student, state.ema, state.fake_score):
        jax.tree.map(np.testing.assert_array_equal, tree, given)
    assert len(set(buffers(state))) == len(buffers(state))
    table = state_shardings(mesh, state)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, table)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(given))


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2)])
def test_a_layer_at_a_time_comes_to_the_same(teacher, monkeypatch, axes):
    """And no read is larger than a layer, nor made twice for devices that have the same part."""
    config, mesh = wan_run(teacher), make_mesh(*axes)
    whole = WeightFiles(config).networks(config, mesh).teacher
    reads, read = [], Tensor.read

    def counted(self, index=None):
        reads.append((self.origin, str(index)))
        assert not self.layers or self.nbytes <= 1000
        return read(self, index)

    monkeypatch.setattr(load, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(Tensor, "read", counted)
    parts = WeightFiles(config).networks(config, mesh).teacher
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.sharding, a.dtype), (b.sharding, b.dtype)), parts, whole)
    of_kernels = [read for read in reads if read[0].endswith("self_attn.q.weight")]
    assert len(of_kernels) == len(set(of_kernels)) == 3 * math.prod(axes[1:])


# --- what is refused ---


def refused(argv):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("rcm_jax.train").main(argv)
    said = stopped.value.code
    assert isinstance(said, str)
    assert "\n" not in said
    return said


def test_a_malicious_pickle_is_not_run(tmp_path):
    zip_with(tmp_path / "evil.pt", pickle.dumps({"w": Evil(tmp_path / "canary")}, protocol=2))
    flags = ["--config=toy_rcm", f"--workdir={tmp_path}/run", f"--config.teacher={tmp_path}/evil.pt"]
    said = refused(flags)
    assert "config.teacher" in said
    assert "is refused: its pickle asks for posix.system" in said
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "run").exists()


def test_files_that_do_not_fit_are_named_with_what_differs(tmp_path, teacher):
    said = refused(["--config=toy_rcm", f"--workdir={tmp_path}/run", "--config.teacher=nowhere.pt"])
    assert said == "error: config.teacher: no model file at nowhere.pt"
    with pytest.raises(ValueError, match=r"config.init: .*x.pt has ffn_dim=64 instead of 80;(.|\n)*ffn_in/bias"):
        WeightFiles(wan_run(teacher, init=teacher, model=dataclasses.replace(T2V, ffn_dim=80), teacher_model=T2V))
    ours = save_model(tmp_path / "ours.safetensors", random_params(T2V), ModelInfo(T2V, "teacher", "wan"))
    fewer = wan_run(teacher, score_teacher=str(ours), score_model=dataclasses.replace(T2V, num_heads=2))
    with pytest.raises(ValueError, match=r"config.score_teacher: .*num_heads=4 instead of 2: the weights do not fit"):
        WeightFiles(fewer)
    eight = {"_class_name": "WanModel", "num_heads": 8}
    told = save(tmp_path / "b" / "x.safetensors", to_wan(random_params(T2V), T2V), config=eight)
    with pytest.raises(ValueError, match=r"config.teacher: .*num_heads=4 is asked for, and the config.json .* says 8"):
        WeightFiles(wan_run(str(told)))
    assert not (tmp_path / "run").exists()


# --- what a run leaves ---


def test_the_world_follows_from_the_data_not_from_its_name():
    shards = DataConfig(name="shards", batch_size=8, latent_shape=(9, 6, 6))
    assert model_info(tiny_run()).world == "toy"
    assert model_info(tiny_run(data=shards)).world == "wan"
    assert fake_info(tiny_run(data=shards)).world == "wan"
    assert fake_info(tiny_run(method={"dmd_scale": 0.0})) is None
    larger = dataclasses.replace(MODEL, ffn_dim=48)
    assert fake_info(tiny_run(score_teacher="x", score_model=larger)).model == larger


def test_weights_on_the_way(tmp_path, monkeypatch, capsys):
    class State:
        ema = perturbed_params(MODEL)

    def trained(config, *_, on_weights, **__):
        on_weights(2, State)
        return State

    monkeypatch.setattr("rcm_jax.training.runs.train", trained)
    config = tiny_run(
        teacher=str(save_model(tmp_path / "t.safetensors", State.ema, ModelInfo(MODEL, "teacher", "toy")))
    )
    left = train_recipe(config, tmp_path, progress="")
    way = tmp_path / "weights" / "0000002" / "student.safetensors"
    assert way.read_bytes() == left.read_bytes()
    way.unlink()
    way.mkdir()  # cannot become the file
    assert train_recipe(config, tmp_path, progress="").is_file()
    assert "no weights of step 2, and the run goes on" in capsys.readouterr().err


def test_an_experts_file_says_its_side_and_teaches_no_other(tmp_path):
    high = {"method": {"t_range": (0.9, 1.0)}}
    config = tiny_run(**high)
    assert model_info(config).t_range == fake_info(config).t_range == (0.9, 1.0)
    path = save_model(tmp_path / "high.safetensors", perturbed_params(MODEL), model_info(config))
    assert WeightFiles(tiny_run(teacher=str(path), **high)).files["teacher"].info.t_range == (0.9, 1.0)
    for method in ({"t_range": (0.0, 0.9)}, {}):
        with pytest.raises(ValueError, match="config.teacher: .*high.safetensors was trained for times from 0.9 to 1"):
            WeightFiles(tiny_run(teacher=str(path), method=method))


def test_networks_that_take_an_image_need_data_that_have_one():
    image = dataclasses.replace(MODEL, in_channels=16)
    with pytest.raises(ValueError, match="in_channels=16 has 4 channels of a condition, and data.name='toy' has no"):
        tiny_run(model=image, data=DataConfig(latent_shape=(9, 6, 6)))
    with pytest.raises(ValueError, match=r"in_channels=16 must be 12: under causal.pattern='c1-2' an image is"):
        tiny_run(model=image, causal=CausalConfig(pattern="c1-2"), method={"consistency": "rf_scm", "dmd_scale": 0.0})
    method = {"consistency": "rf_scm", "dmd_scale": 0.0, "t_range": (0.9, 1.0)}
    with pytest.raises(ValueError, match=r"t_range=\(0.9, 1.0\) is for bidirectional networks"):
        tiny_run(causal=CausalConfig(pattern="c1-2"), method=method)
