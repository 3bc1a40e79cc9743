"""Networks out of the checkpoints of a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rcm_jax.checksums import checksum_of_part, checksums
from rcm_jax.convert.commands import main
from rcm_jax.convert.tensors import Tensor
from rcm_jax.convert.training import open_step
from rcm_jax.model_file import load_model
from rcm_jax.parallel import make_mesh, shard
from rcm_jax.training.info import fake_info, model_info
from rcm_jax.training.state import NormRecord, TrainState
from tests.test_entry_points import fails
from tests.tiny import MODEL, perturbed_params, tiny_run

LARGER = dataclasses.replace(MODEL, ffn_dim=40)
RUN = tiny_run(score_teacher="given", score_model=LARGER)


def write(folder, state, about, step, save_args=None):
    """As `Checkpoints` does, but for the chunks of the arrays."""
    about = about | {"checksums": checksums(jax.tree.map(jnp.asarray, state), make_mesh(1, 8, 1))}
    item = ocp.args.StandardSave(state, save_args=save_args)
    with ocp.CheckpointManager(folder) as manager:
        manager.save(step, args=ocp.args.Composite(state=item, about=ocp.args.JsonSave(about)))
    return folder / str(step)


@pytest.fixture(scope="module")
def state():
    student, ema, fake = (perturbed_params(model, seed) for seed, model in enumerate((MODEL, MODEL, LARGER)))
    student, ema = shard((student, ema), make_mesh(1, 8, 1))
    return TrainState(np.int32(7), np.int32(0), student, ema, {}, NormRecord.empty(), fake)


@pytest.fixture(scope="module")
def about():
    return {"step": 7, "model": model_info(RUN).to_json(), "fake_model": fake_info(RUN).to_json()}


@pytest.fixture(scope="module")
def step(tmp_path_factory, state, about):
    return write(tmp_path_factory.mktemp("run") / "checkpoints", state, about, 7)


def test_each_network_comes_out_as_it_lay(tmp_path, step, state, capsys):
    wanted = {"average": (state.ema, model_info(RUN)), "student": (state.student, model_info(RUN)),
              "fake_score": (state.fake_score, fake_info(RUN))}  # fmt: skip
    for which, (tree, info) in wanted.items():
        out = tmp_path / f"{which}.safetensors"
        main(["checkpoint", str(step), str(out), *(["--which", which] if which != "average" else [])])
        assert f"entry {which}" in capsys.readouterr().out
        params, found = load_model(out)
        assert found == info
        jax.tree.map(np.testing.assert_array_equal, params, tree)
    main(["checkpoint", str(step), str(tmp_path / "folder"), "--format", "orbax"])
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "folder")[0], state.ema)


def test_layers_that_lie_apart_are_read_alone(tmp_path, state, about, monkeypatch):
    """Of a checkpoint in chunks of a layer; of another each leaf is read once, not once a layer."""
    apart = jax.tree.map(lambda x: ocp.SaveArgs(shard_axes=(0,)) if np.ndim(x) == 3 else ocp.SaveArgs(), state)
    for name, save_args, most in (("apart", apart, 24 * 32), ("whole", None, 2 * 24 * 32)):
        source = open_step(write(tmp_path / name, state, about, 3, save_args))
        sizes, told = [], type(source)

        def counted(array, place, sizes=sizes):
            sizes.append((place, array.size))
            return array

        monkeypatch.setattr("rcm_jax.convert.training.check_finite", counted)
        tensor = source.ours()["blocks/ffn_in/kernel"]
        assert isinstance(tensor, Tensor)
        assert told.__name__ == "Checkpoint"
        np.testing.assert_array_equal(np.stack([*tensor.blocks()]), state.ema["blocks"]["ffn_in"]["kernel"])
        assert max(size for _, size in sizes) == most
        assert sum(size for _, size in sizes) == 2 * 24 * 32


def test_what_is_no_checkpoint(tmp_path, step, state, about):
    out = str(tmp_path / "x.safetensors")
    fails(main, ["checkpoint", str(step.parent), out], "is no checkpoint of a training run", f"are {step}")
    fails(main, ["checkpoint", str(step.parent.parent), out], f"its checkpoints are {step}")
    fails(main, ["checkpoint", str(step), str(step / "x.safetensors")], "is in the checkpoint that is read")
    alone = dataclasses.replace(state, fake_score=None)
    without = write(tmp_path / "without", alone, about | {"fake_model": None}, 1)
    fails(main, ["checkpoint", str(without), out, "--which", "fake_score"], "says nothing of its fake_score")


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_checkpoint_is_one_line_and_leaves_no_file(tmp_path, state, about, harm):
    folder = write(tmp_path / "run", state, about, 5)
    for data in [*(folder / "state").rglob("d/*")]:
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2]) if harm == "cut" else data.unlink()
    fails(main, ["checkpoint", str(folder), str(tmp_path / "x.safetensors")], f"{folder} is damaged", "cannot be read")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_flipped_bit_is_not_converted(tmp_path, state, about):
    """The number stays finite, and the file reads: only the checksum tells."""
    changed = np.array(state.ema["blocks"]["ffn_in"]["kernel"])
    changed.view(np.uint32)[1, 2, 3] ^= 1 << 20
    other = state.replace(ema=jax.tree_util.tree_map_with_path(
        lambda path, x: changed if jax.tree_util.keystr(path) == "['blocks']['ffn_in']['kernel']" else x, state.ema
    ))  # fmt: skip
    folder = write(tmp_path / "run", other, about, 5)
    told = json.loads((folder / "about" / "metadata").read_text())
    right = checksums({"ema": state.ema}, make_mesh(1, 8, 1))
    (folder / "about" / "metadata").write_text(json.dumps(told | {"checksums": right}))
    out = tmp_path / "x.safetensors"
    fails(main, ["checkpoint", str(folder), str(out)], "ema/blocks/ffn_in/kernel is not as it was saved")
    assert not out.exists()


def test_a_checksum_is_the_sum_of_its_parts():
    x = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    whole = checksums({"x": jnp.asarray(x)}, make_mesh(1, 8, 1))["x"]
    parts = [checksum_of_part(x[i : i + 2], i * 21) for i in (0, 2, 4)]
    assert whole == sum(parts) % 2**32 == checksum_of_part(x, 0)
