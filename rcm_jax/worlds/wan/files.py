"""Finds and opens the files that a Wan video is made from, ours or anybody's, and loads their weights."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from tqdm import tqdm

from rcm_jax.convert.checkpoint import Checkpoint, differences, open_checkpoint
from rcm_jax.convert.networks import NETWORKS, with_dtype
from rcm_jax.convert.tensors import total_bytes
from rcm_jax.parallel import state_shardings
from rcm_jax.types import Params
from rcm_jax.wan.config import WAN_1_3B, WAN_14B, DiTConfig
from rcm_jax.wan.tokenizer import Tokenizer, open_tokenizer

CHECKPOINTS = (Path("checkpoints"), Path("assets/checkpoints"))  # where rCM's commands look
FLAGS = {"dit": "--dit_path", "vae": "--vae_path", "umt5": "--text_encoder_path", "clip": "--image_encoder_path"}
USUAL = {  # the published file, diffusers' folder, and what docs/convert.md calls the converted file
    "vae": ("Wan2.1_VAE.pth", "vae", "vae.safetensors"),
    "umt5": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder", "umt5.safetensors"),
    "clip": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "image_encoder", "clip.safetensors"),
}
TOKENIZERS = ("google/umt5-xxl", "tokenizer")
SIZES = {"1.3B": WAN_1_3B, "14B": WAN_14B}


@dataclasses.dataclass(frozen=True)
class WanFiles:
    """Names and shapes are read and checked, weights are not. dit: one network, or Wan2.2's for more and for less
    noise. clip: None where the network takes no CLIP tokens."""

    dit: tuple[Checkpoint, ...]
    vae: Checkpoint
    text: Checkpoint
    tokenizer: Tokenizer
    clip: Checkpoint | None


def open_files(
    dit: Sequence[str | Path],
    *,
    vae: str | None = None,
    text: str | None = None,
    tokenizer: str | None = None,
    clip: str | None = None,
    model_size: str | None = None,
    num_heads: int | None = None,
) -> WanFiles:
    """Opens what is named; what is not is looked for beside the DiT and in rCM's folders.

    Raises FileNotFoundError that says where it looked, and ValueError for a file of another network or size, or
    networks that do not go together.
    """
    networks = tuple(_open("dit", path, num_heads) for path in dit)
    config = networks[0].config
    for network in networks[1:]:
        if found := differences(config, network.config):
            raise ValueError(f"{networks[0].path} and {network.path} differ in size: {', '.join(found)}")
    if model_size is not None:
        _check_size(networks[0], model_size)
    near = _near(networks[0].path)
    opened_vae, opened_text = _open("vae", vae or _find("vae", near)), _open("umt5", text or _find("umt5", near))
    if opened_vae.config.z_dim != config.out_channels:
        raise ValueError(
            f"{opened_vae.path} has latents of {opened_vae.config.z_dim} channels, the network {config.out_channels}"
        )
    if opened_text.config.dim != config.text_dim:
        raise ValueError(
            f"{opened_text.path} gives features of width {opened_text.config.dim}, the network takes {config.text_dim}"
        )
    places = [tokenizer] if tokenizer else _tokenizer_places(opened_text.path)
    opened_clip = None if config.image_dim is None else _open("clip", clip or _find("clip", near))
    files = WanFiles(networks, opened_vae, opened_text, open_tokenizer(places), opened_clip)
    if files.tokenizer.size > opened_text.config.vocabulary:
        raise ValueError(
            f"{files.tokenizer.path} has {files.tokenizer.size} tokens and {opened_text.path} knows "
            f"{opened_text.config.vocabulary}: it is another encoder's tokenizer"
        )
    return files


def takes_image(config: DiTConfig) -> bool:
    """Whether a DiT is image-to-video: it has channels of a condition behind the noise."""
    return config.in_channels > config.out_channels


def _open(kind: str, path: str | Path, num_heads: int | None = None) -> Checkpoint:
    found = open_checkpoint(path, num_heads=num_heads)
    if found.network.name != kind:
        wanted = next(network for network in NETWORKS if network.name == kind)
        raise ValueError(f"{path} is a {found.network.title}, not a {wanted.title} ({FLAGS[kind]})")
    found.ours()  # raises for what is missing, left over or misshapen
    return found


def _check_size(network: Checkpoint, model_size: str) -> None:
    wanted, found = dataclasses.asdict(SIZES[model_size]), dataclasses.asdict(network.config)
    names = ("dim", "ffn_dim", "num_heads", "num_layers")
    differ = [f"{n}={found[n]} instead of {wanted[n]}" for n in names if found[n] != wanted[n]]
    if differ:
        raise ValueError(f"{network.path} is not of --model_size {model_size}: {', '.join(differ)}")


def _near(path: Path) -> list[Path]:
    """The folder of a file (itself, if it is a folder) and the one above, then rCM's."""
    folder = path if path.is_dir() else path.parent
    return [folder, folder.absolute().parent, *CHECKPOINTS]


def _find(kind: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        for name in USUAL[kind]:
            if (folder / name).exists():
                return folder / name
    title = next(network.title for network in NETWORKS if network.name == kind)
    raise FileNotFoundError(
        f"no {title}: {', '.join(map(str, folders))} have no {' or '.join(USUAL[kind])}; name it with {FLAGS[kind]}. "
        f"Wan2.1 is published with it as {USUAL[kind][0]}"
    )


def _tokenizer_places(text: Path) -> list[Path]:
    return [folder / name for folder in _near(text) for name in ("", *TOKENIZERS) if folder / name != Path()]


def load(source: Checkpoint, mesh: Mesh, *, dtype: str) -> Params:
    """The weights on the mesh, sharded by `parallel`'s table; what is computed with in float32 stays float32."""
    flat = with_dtype(source.ours(), dtype, source.network)
    tree: dict[str, Any] = unflatten_dict(flat, sep="/")
    size = total_bytes(flat)
    with tqdm(desc=f"load {source.network.name}", total=size, unit="B", unit_scale=True, delay=2, leave=False) as bar:

        def place(tensor, sharding):
            array = jax.make_array_from_callback(tensor.shape, sharding, tensor.read)
            bar.update(tensor.nbytes)
            return array

        return jax.tree.map(place, tree, state_shardings(mesh, tree))
