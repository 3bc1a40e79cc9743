"""CLIP's image tower is kept whole, so that it goes back; what computes does not load the end of it."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from rcm_jax.convert import clip
from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.commands import main
from rcm_jax.convert.files import open_weights
from rcm_jax.convert.load import load_params
from rcm_jax.convert.tensors import Tensor
from rcm_jax.model_file import load_model
from rcm_jax.wan.networks import abstract_network
from tests.convert.test_networks import CONFIGS, params
from tests.convert.tiny import save
from tests.test_entry_points import fails

CONFIG = CONFIGS["clip"]
HEADS = ["--num_heads", "2"]


@functools.cache
def published() -> dict[str, np.ndarray]:
    """One block more than is computed, norm and projection, the text tower, and the scale between the two."""
    rng = np.random.default_rng(3)
    whole = dataclasses.replace(CONFIG, num_layers=CONFIG.num_layers + 1)
    draw = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_network(whole))
    out = clip.to_wan(draw, whole) | clip.to_wan(params("clip"), CONFIG)
    shapes = {"visual.post_norm.weight": (16,), "visual.post_norm.bias": (16,), "visual.head": (16, 8)}
    shapes |= {"textual.blocks.0.norm1.weight": (6,), "textual.token.weight": (5, 6), "log_scale": ()}
    return out | {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in shapes.items()}


TOWER = {name for name in published() if name.startswith("visual.")}


@pytest.fixture
def source(tmp_path):
    return str(save(tmp_path / "x.pth", published()))


def same(path, names) -> None:
    found = open_weights(path).groups[""]
    assert set(found) == set(names)
    for name in names:
        np.testing.assert_array_equal(found[name].read(), published()[name], err_msg=name, strict=True)


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
@pytest.mark.parametrize("text", [False, True], ids=["tower", "with its text tower"])
def test_back_to_the_published_names(tmp_path, source, format, text):
    ours = str(tmp_path / ("o.safetensors" if format == "safetensors" else "o"))
    main([source, ours, "--format", format, *HEADS, *["--text_tower"] * text])
    main(["export", ours, str(tmp_path / "back.pth")])
    same(tmp_path / "back.pth", published() if text else TOWER)
    main(["export", source, str(tmp_path / "straight.safetensors"), *HEADS])  # all that the file has
    same(tmp_path / "straight.safetensors", published())


def test_what_computes_does_not_load_the_end(tmp_path, source, monkeypatch):
    for format, name in (("safetensors", "o.safetensors"), ("orbax", "o")):
        main([source, str(tmp_path / name), "--format", format, *HEADS])
        loaded, info = load_model(tmp_path / name)
        assert info.model == CONFIG
        jax.tree.map(np.testing.assert_array_equal, loaded, params("clip"))
        opened = open_checkpoint(tmp_path / name)
        assert "left aside: what Wan does not use" in str(opened)
        untouched = {name: Tensor(t.shape, t.dtype, lambda: pytest.fail("read")) for name, t in opened.besides.items()}
        assert len(untouched) == 12 + 2 + 1
        jax.tree.map(
            np.testing.assert_array_equal,
            load_params(dataclasses.replace(opened, besides=untouched)), params("clip"),
        )  # fmt: skip


def test_rounding_leaves_norms(tmp_path, source):
    main([source, str(tmp_path / "o.safetensors"), "--dtype", "bfloat16", *HEADS])
    besides = open_checkpoint(tmp_path / "o.safetensors").besides
    kept = {name for name, tensor in besides.items() if tensor.dtype == np.float32}
    assert kept == {name for name in besides if "norm" in name}
    assert len(kept) == 6


def test_to_transformers_and_back(tmp_path, source):
    main([source, str(tmp_path / "o.safetensors"), *HEADS])
    main(["export", str(tmp_path / "o.safetensors"), str(tmp_path / "image_encoder"), "--to", "transformers"])
    config = json.loads((tmp_path / "image_encoder" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_act"]) == (CONFIG.num_layers + 1, "gelu")
    found = open_weights(tmp_path / "image_encoder").groups[""]
    assert found["vision_model.embeddings.position_embedding.weight"].shape == (10, 16)
    assert found["vision_model.encoder.layers.2.self_attn.k_proj.weight"].shape == (16, 16)
    main(["export", str(tmp_path / "image_encoder"), str(tmp_path / "back.safetensors")])
    same(tmp_path / "back.safetensors", TOWER - {"visual.head"})


def test_a_tower_without_its_end_does_not_go_back(tmp_path, source):
    missing = "visual.transformer.2.mlp.2.bias"
    other = save(tmp_path / "y.pth", {name: x for name, x in published().items() if name != missing})
    main([str(other), str(tmp_path / "o.safetensors"), *HEADS])
    for path in (other, tmp_path / "o.safetensors"):
        out = str(tmp_path / "z.pth")
        fails(main, ["export", str(path), out, *HEADS], f"lacks what Wan does not use of it: {missing}; convert")
