"""Against the installed PEFT: its own folders, read with the alpha that lies beside the numbers."""

import numpy as np
import pytest

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.load import load_params
from rcm_jax.convert.merge import add_lora
from tests.convert.parity import assert_equal

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "more", [{}, {"alpha_pattern": {"to_q": 9}, "rank_pattern": {"ffn.net.2": 5}}], ids=["one alpha", "several"]
)
def test_a_trained_adapter(tmp_path, more):
    from tests.convert.test_parity_diffusers import dit, our_velocity, their_velocity

    model = dit(image=True)
    model.save_pretrained(tmp_path / "base")
    alone = their_velocity(model, image=True)
    settings = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["to_q", "to_out.0", "ffn.net.2", "add_k_proj"], init_lora_weights=False,
        **more,
    )  # fmt: skip
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = their_velocity(adapted, image=True)
    assert np.linalg.norm(theirs - alone) > 0.05 * np.linalg.norm(alone)
    source = add_lora(open_checkpoint(tmp_path / "base"), tmp_path / "adapter")
    assert_equal(our_velocity(load_params(source), source.config, image=True), theirs)
