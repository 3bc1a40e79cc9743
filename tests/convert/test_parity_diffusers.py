"""Against the installed diffusers: networks go both ways and give the same numbers there and here."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import rcm_jax
from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.export import export
from rcm_jax.convert.load import load_params
from rcm_jax.convert.lora import FORMS, of_parameters, write_lora
from rcm_jax.convert.merge import add_lora
from rcm_jax.convert.output import write_model
from rcm_jax.convert.tensors import Tensor
from rcm_jax.model_file import ModelInfo, load_model
from rcm_jax.sampling.noise import draw_noise
from rcm_jax.sampling.ode import wan_times
from rcm_jax.training.lora import LoraConfig, init_lora, with_base
from rcm_jax.wan.config import WAN22_VAE, DiTConfig
from rcm_jax.wan.dit import DiT
from rcm_jax.wan.vae import VAE
from tests.convert.parity import assert_equal, randomised
from tests.wan.tiny import NAMES, TI2V, write_wan

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
LATENTS = RNG.normal(size=(2, 3, 4, 6, 16)).astype(np.float32)
TIMES = np.array([3.0, 40.5], np.float32)  # diffusers takes sinusoids of float32 angles, which are off at 1000
TEXT = RNG.normal(size=(2, 512, 40)).astype(np.float32)
IMAGE = RNG.normal(size=(2, 257, 24)).astype(np.float32)
VIDEO = RNG.uniform(-1, 1, (1, 9, 32, 48, 3)).astype(np.float32)
VAE_SIZES = dict(base_dim=8, z_dim=4, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0])
WAN22 = dict(  # what its config.json says besides
    decoder_base_dim=12, is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_temporal=4,
    scale_factor_spatial=16,
)  # fmt: skip


def dit(image: bool, heads: int = 4):
    """diffusers' own, every weight random."""
    sizes = dict(
        num_attention_heads=heads, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=40, freq_dim=32,
        ffn_dim=96, num_layers=2, image_dim=24 if image else None, added_kv_proj_dim=12 * heads if image else None,
    )  # fmt: skip
    return randomised(diffusers.WanTransformer3DModel(**sizes))


def first(x: np.ndarray) -> "torch.Tensor":
    """Channels to the front."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def last(x: "torch.Tensor") -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


def their_velocity(model, image: bool) -> np.ndarray:
    tokens = {"encoder_hidden_states_image": torch.from_numpy(IMAGE)} if image else {}
    with torch.no_grad():
        v = model(first(LATENTS), torch.from_numpy(TIMES), torch.from_numpy(TEXT), return_dict=False, **tokens)[0]
    return last(v)


def our_velocity(params, config: DiTConfig, image: bool) -> np.ndarray:
    network = DiT(dataclasses.replace(config, dtype="float32"))
    return np.asarray(network.apply({"params": params}, LATENTS, TIMES, TEXT, IMAGE if image else None))


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize("shards", ["10GB", "100KB"])
def test_dit_from_diffusers(tmp_path, image, shards):
    model = dit(image)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (shards == "100KB") == bool(list(tmp_path.glob("*.index.json")))
    source = open_checkpoint(tmp_path)
    assert (source.dialect, source.config.num_heads) == ("diffusers", 4)
    assert_equal(our_velocity(load_params(source), source.config, image), their_velocity(model, image))


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_dit_to_diffusers(tmp_path, image):
    dit(image).save_pretrained(tmp_path / "theirs")
    source = open_checkpoint(tmp_path / "theirs")
    shifted = {name: tensor.apply(lambda x: x[..., ::-1]) for name, tensor in source.ours().items()}
    write_model(tmp_path / "ours", shifted, ModelInfo(source.config, "student", "wan"))
    export(open_checkpoint(tmp_path / "ours"), tmp_path / "back", "diffusers")
    model, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    params, info = load_model(tmp_path / "ours")
    assert_equal(our_velocity(params, info.model, image), their_velocity(model, image))


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_that_is_exported_gives_diffusers_our_numbers(tmp_path, form):
    """Each form through the door of diffusers' users, on a network with image tokens."""
    model = dit(image=True)
    model.save_pretrained(tmp_path / "base")
    source = open_checkpoint(tmp_path / "base")
    lora = LoraConfig(rank=3, alpha=1.5)
    start = init_lora(lora, source.config, jax.random.key(0))
    factors = jax.tree.map(lambda x: x + 0.2 * RNG.normal(size=x.shape).astype(np.float32), start)
    flat = {name: Tensor.of(x) for name, x in flatten_dict(factors, sep="/").items()}
    written = of_parameters(flat, source.config, alpha=lora.strength, info=ModelInfo(source.config, "student", "wan"))
    write_lora(written, tmp_path / "lora.safetensors", form)

    pipe = diffusers.WanImageToVideoPipeline(None, None, None, None, transformer=model)
    alone = their_velocity(model, image=True)
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
    base = load_params(source)
    theirs = their_velocity(model, image=True)
    assert_equal(our_velocity(with_base(base, factors, lora), source.config, image=True), theirs)
    assert np.linalg.norm(theirs - alone) > 0.1 * np.linalg.norm(alone)
    merged = add_lora(source, tmp_path / "lora.safetensors")
    assert_equal(our_velocity(load_params(merged), source.config, image=True), theirs)


def test_torch_reads_what_is_exported_and_we_read_what_it_saves(tmp_path):
    dit(False).save_pretrained(tmp_path / "theirs")
    source = open_checkpoint(tmp_path / "theirs")
    export(source, tmp_path / "wan.pth", "wan", dtype="bfloat16")
    state = torch.load(tmp_path / "wan.pth", weights_only=True, mmap=True)
    again = {f"net.{name}": value for name, value in state.items()}
    for new in (True, False):
        torch.save({"model": again, "step": 3}, tmp_path / "again.pt", _use_new_zipfile_serialization=new)
        back = open_checkpoint(tmp_path / "again.pt", num_heads=4)
        assert back.entry == "model.net"
        for name, tensor in source.wan("bfloat16").items():
            np.testing.assert_array_equal(back.tensors[name].read(), tensor.read(), strict=True)
            assert str(state[name].dtype) == f"torch.{tensor.dtype}"


def their_vae(model) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        latents = model.encode(first(VIDEO)).latent_dist.mode()
        return last(latents), last(model.decode(latents).sample)


def our_vae(params, config) -> tuple[np.ndarray, np.ndarray]:
    """diffusers leaves the normalisation of latents to its pipeline."""
    vae = VAE(config)
    latents = np.asarray(vae.encode(params, VIDEO))
    raw = latents * np.float32(config.std) + np.float32(config.mean)
    return raw, np.clip(vae.decode(params, latents), -1, 1)


@pytest.mark.parametrize("besides", [{}, WAN22], ids=["wan2.1", "wan2.2"])
def test_vae_both_ways(tmp_path, besides):
    sizes = VAE_SIZES | besides
    model = randomised(diffusers.AutoencoderKLWan(**sizes))
    model.save_pretrained(tmp_path / "theirs")
    source = open_checkpoint(tmp_path / "theirs")
    assert (source.dialect, source.config.mean, source.config.dim) == ("diffusers", (0.1, -0.2, 0.3, 0.0), 8)
    params = load_params(source)
    for ours, theirs in zip(our_vae(params, source.config), their_vae(model), strict=True):
        assert_equal(ours, theirs)

    write_model(tmp_path / "ours", source.ours(), ModelInfo(source.config, "vae", "wan"))
    export(open_checkpoint(tmp_path / "ours"), tmp_path / "back", "diffusers")
    again, info = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    jax.tree.map(np.testing.assert_array_equal, their_vae(again), their_vae(model))
    assert {name: again.config[name] for name in sizes} == sizes


def set_times(scheduler, times, own, num_steps, **given):
    own(num_steps, **given)
    scheduler.sigmas = torch.tensor(times.sigmas)
    scheduler.timesteps = torch.tensor([round(1000 * t) for t in times.times])


@pytest.mark.parametrize("image", [False, True], ids=["text", "text and image"])
def test_ti2v_samples_as_diffusers_does(tmp_path, monkeypatch, image):
    """Its folder as diffusers keeps it; a call of either from the same noise, features and times."""
    sizes = VAE_SIZES | WAN22 | dict(z_dim=48, latents_mean=list(WAN22_VAE.mean), latents_std=list(WAN22_VAE.std))
    vae = randomised(diffusers.AutoencoderKLWan(**sizes))
    model = randomised(diffusers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=48, out_channels=48, text_dim=24, freq_dim=32,
        ffn_dim=96, num_layers=2,
    ))  # fmt: skip
    write_wan(tmp_path, TI2V)  # for its text encoder
    vae.save_pretrained(tmp_path / "vae")
    model.save_pretrained(tmp_path / "transformer")
    (tmp_path / NAMES["vae22"]).unlink()
    picture = Image.fromarray(RNG.integers(0, 255, (64, 96, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    text, null = (RNG.normal(size=(1, 512, 24)).astype(np.float32) for _ in range(2))

    pipe = rcm_jax.load(tmp_path / "transformer", dtype="float32")
    asked = {"image_path": tmp_path / "picture.png"} if image else {}
    ours = pipe.latents(
        "a fox", features=(text, null), size="96x64", num_frames=9, num_steps=4, sampler="wan_unipc", **asked
    )
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    times = wan_times(4)  # theirs begin a thousandth higher than Wan's own
    monkeypatch.setattr(scheduler, "set_timesteps", partial(set_times, scheduler, times, scheduler.set_timesteps))
    kind = diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline
    theirs = kind(None, None, vae=vae, scheduler=scheduler, transformer=model, expand_timesteps=True)
    theirs.set_progress_bar_config(disable=True)
    found = theirs(
        prompt_embeds=torch.from_numpy(text), negative_prompt_embeds=torch.from_numpy(null), height=64, width=96,
        num_frames=9, num_inference_steps=4, guidance_scale=5.0, output_type="latent",
        latents=first(np.asarray(draw_noise(0, [0], (3, 4, 6, 48)))), **({"image": picture} if image else {}),
    )  # fmt: skip
    assert_equal(ours, last(found.frames), 1e-4)
