"""Wan2.1's folder in miniature: the published names and layouts, a few hundred kilobytes of random weights."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from rcm_jax.convert import clip, dit, tiny_vae, umt5, vae
from rcm_jax.wan.config import WAN22_VAE, CLIPConfig, DiTConfig, TinyVAEConfig, UMT5Config, VAEConfig
from rcm_jax.wan.networks import abstract_network
from tests.convert.tiny import save

DIT = DiTConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=24, dtype="bfloat16")
I2V = DiTConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, in_channels=36, freq_dim=16, text_dim=24, image_dim=80,
    dtype="bfloat16",
)  # fmt: skip
TI2V = dataclasses.replace(DIT, in_channels=48, out_channels=48, image_first=True)
VAE = VAEConfig(dim=4)
VAE22 = dataclasses.replace(WAN22_VAE, dim=4, decoder_dim=6)
TINY_VAE = TinyVAEConfig(decoder_widths=(8, 6, 5, 4), encoder_width=4)
UMT5 = UMT5Config(vocabulary=200, dim=24, attention_dim=16, ffn_dim=32, num_heads=2, num_layers=3, dtype="bfloat16")
CLIP = CLIPConfig(dim=80, num_heads=1, num_layers=2, image_size=28)
TABLES = {"dit": dit, "vae": vae, "tiny_vae": tiny_vae, "umt5": umt5, "clip": clip}
NAMES = {
    "dit": "diffusion_pytorch_model.safetensors",
    "vae": "Wan2.1_VAE.pth",
    "vae22": "Wan2.2_VAE.pth",
    "tiny_vae": "taew2_1.pth",
    "umt5": "models_t5_umt5-xxl-enc-bf16.pth",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}
CORPUS = ["a red fox in the snow", "a cat on a boat", "two dogs run over the beach", "it rains & snows in the town"] * 5


def arrays(name: str, config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, scaled so that activations stay small, by the published names."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan = leaf.shape[-2] if len(leaf.shape) > 1 else 4
        return rng.normal(size=leaf.shape, scale=fan**-0.5).astype(np.float32)

    out = TABLES[name].to_wan(jax.tree.map(draw, abstract_network(config)), config)
    if name == "clip":
        last = f"visual.transformer.{config.num_layers}.norm1.bias"  # of the block that Wan does not use
        out |= {last: np.zeros(4, np.float32), "textual.x": np.zeros(3, np.float32)}
    return out


def write_tiny_vae(folder: Path) -> Path:
    """The tiny autoencoder's file; it is not published beside the others."""
    return save(folder / NAMES["tiny_vae"], arrays("tiny_vae", TINY_VAE, 2))


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json of a few dozen pieces with umT5's special ones."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    found = Tokenizer(models.Unigram())
    found.normalizer = normalizers.NFKC()
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    found.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    found.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_sentencepiece(folder: Path) -> Path:
    """The same as a spiece.model."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=file, vocab_size=60, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    return folder / "spiece.model"


def write_wan(folder: Path, config: DiTConfig = DIT, seed: int = 0) -> Path:
    """The folder as it is published: DiT with its config.json, autoencoder, umT5, its tokenizer, CLIP for I2V; of
    TI2V-5B with Wan2.2's autoencoder."""
    model = {"_class_name": "WanModel", "num_heads": config.num_heads}
    save(folder / NAMES["dit"], arrays("dit", config, seed), config=model)
    vae, file = (VAE22, "vae22") if config.image_first else (VAE, "vae")
    save(folder / NAMES[file], arrays("vae", vae, seed + 1))
    for name, other in (("umt5", UMT5), ("clip", CLIP)):
        if name != "clip" or config.image_dim is not None:
            save(folder / NAMES[name], arrays(name, other, seed + 1))
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def pieces(params, function, x, lengths):
    """`function` over pieces of x, and the states between them."""
    out, states, state, start = [], [], None, 0
    for n in lengths:
        part, state = jax.jit(function)(params, x[:, start : start + n], state)
        out, states, start = [*out, part], [*states, state], start + n
    assert start == x.shape[1]
    return np.concatenate(out, axis=1), states


def write_picture(folder: Path) -> Path:
    """Noise, wider than high."""
    path = folder / "p.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)).save(path)
    return path
