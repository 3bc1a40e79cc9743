"""Against the installed transformers: text encoder both ways, image tower into ours."""

import dataclasses

import numpy as np
import pytest

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.export import export
from rcm_jax.convert.load import load_params
from rcm_jax.convert.output import write_model
from rcm_jax.model_file import ModelInfo
from rcm_jax.wan.clip import CLIP
from rcm_jax.wan.umt5 import UMT5
from tests.convert.parity import assert_equal, randomised

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

IDS = np.random.default_rng(0).integers(2, 60, (2, 150))
MASK = (np.arange(150)[None] < np.array([[150], [90]])).astype(np.int64)


def their_features(model) -> np.ndarray:
    with torch.no_grad():
        hidden = model(torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK)).last_hidden_state.numpy()
    return hidden * MASK[:, :, None]  # rows past the prompt are zeros for Wan


def test_umt5_both_ways(tmp_path):
    sizes = transformers.UMT5Config(vocab_size=60, d_model=32, d_kv=6, d_ff=48, num_layers=3, num_heads=4)
    model = randomised(transformers.UMT5EncoderModel(sizes))
    model.save_pretrained(tmp_path / "theirs")
    source = open_checkpoint(tmp_path / "theirs")
    assert (source.dialect, source.config.num_heads, source.config.attention_dim) == ("transformers", 4, 24)
    network = UMT5(dataclasses.replace(source.config, dtype="float32"))
    assert_equal(np.asarray(network.apply({"params": load_params(source)}, IDS, MASK)), their_features(model))

    write_model(tmp_path / "ours", source.ours(), ModelInfo(source.config, "umt5", "wan"))
    export(open_checkpoint(tmp_path / "ours"), tmp_path / "back", "transformers")
    again, info = transformers.UMT5EncoderModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    np.testing.assert_array_equal(their_features(again), their_features(model))


def test_umt5_with_its_embedding_twice(tmp_path):
    sizes = transformers.UMT5Config(vocab_size=60, d_model=32, d_kv=6, d_ff=48, num_layers=1, num_heads=4)
    state = dict(randomised(transformers.UMT5EncoderModel(sizes)).state_dict())
    torch.save(state, tmp_path / "x.pt")
    np.testing.assert_array_equal(
        open_checkpoint(tmp_path / "x.pt").ours()["token_embedding"].read(), state["shared.weight"]
    )
    state["encoder.embed_tokens.weight"] = state["shared.weight"] + 1
    torch.save(state, tmp_path / "y.pt")
    with pytest.raises(ValueError, match="must hold the same numbers as shared.weight"):
        open_checkpoint(tmp_path / "y.pt")


@pytest.mark.parametrize("whole", [False, True], ids=["tower", "with projection"])
def test_clip_from_transformers(tmp_path, whole):
    sizes = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7,
        hidden_act="gelu",
    )  # fmt: skip
    kind = transformers.CLIPVisionModelWithProjection if whole else transformers.CLIPVisionModel
    model = randomised(kind(sizes))
    model.save_pretrained(tmp_path)
    source = open_checkpoint(tmp_path)
    assert (source.dialect, source.config.num_layers, source.config.num_heads) == ("transformers", 2, 2)
    image = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
        hidden = model(pixels, output_hidden_states=True).hidden_states[-2].numpy()
    assert_equal(np.asarray(CLIP(source.config).apply({"params": load_params(source)}, image)), hidden)

    write_model(tmp_path / "ours", source.ours(), ModelInfo(source.config, "clip", "wan"), besides=source.besides)
    export(open_checkpoint(tmp_path / "ours"), tmp_path / "image_encoder", "transformers")
    again, info = transformers.CLIPVisionModel.from_pretrained(tmp_path / "image_encoder", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        theirs, back = (m(pixels, output_hidden_states=True) for m in (model, again))
    for one, other in zip(theirs.hidden_states, back.hidden_states, strict=True):
        assert torch.equal(one, other)
    if not whole:
        assert torch.equal(theirs.pooler_output, back.pooler_output)  # after the last block and its norm
