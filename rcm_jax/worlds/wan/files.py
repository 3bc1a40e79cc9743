"""Finds and opens the files that a Wan video is made from, ours or anybody's, and loads their weights."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from rcm_jax.convert.checkpoint import Checkpoint, differences, open_checkpoint
from rcm_jax.convert.networks import NETWORKS
from rcm_jax.errors import ArgumentError, MissingFileError
from rcm_jax.hub import Place, Published, fetched, find, unreached
from rcm_jax.wan.config import TAEW2_1, WAN22_TI2V_5B, WAN22_VAE, WAN_1_3B, WAN_14B, WAN_VAE
from rcm_jax.wan.tokenizer import FILES, Tokenizer, open_tokenizer, tokenizer_of_bytes

CHECKPOINTS = (Path("checkpoints"), Path("assets/checkpoints"))  # where rCM's commands look
ARGUMENTS = {
    "dit": "dit_path", "vae": "vae_path", "tiny_vae": "tiny_vae_path", "umt5": "text_encoder_path",
    "clip": "image_encoder_path",
}  # fmt: skip
# the published file, diffusers' folder, what docs/convert.md calls the converted file, and ComfyUI's
VAES = {  # by the channels of their latents
    WAN_VAE.z_dim: ("Wan2.1_VAE.pth", "vae", "vae.safetensors", "wan_2.1_vae.safetensors"),
    WAN22_VAE.z_dim: ("Wan2.2_VAE.pth", "vae", "vae.safetensors", "wan2.2_vae.safetensors"),
}
USUAL = {
    "vae": tuple(dict.fromkeys(itertools.chain(*VAES.values()))),
    "tiny_vae": ("taew2_1.pth", "taew2_1.safetensors", "tiny_vae.safetensors"),  # of TAEHV
    "umt5": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder", "umt5.safetensors", "umt5_xxl_fp16.safetensors",
             "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
    "clip": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "image_encoder", "clip.safetensors",
             "clip_vision_h.safetensors"),
}  # fmt: skip
TOKENIZERS = ("google/umt5-xxl", "tokenizer")
SIZES = {"1.3B": WAN_1_3B, "5B": WAN22_TI2V_5B, "14B": WAN_14B}


@dataclasses.dataclass(frozen=True)
class WanFiles:
    """Names and shapes are read and checked, weights are not. dit: one network, or Wan2.2's for more and for less
    noise; none where encoders alone are asked for. text, tokenizer: None where no text is. clip: None where the network
    takes no CLIP tokens. tiny: the decoder of the frames, where it is not the autoencoder's."""

    dit: tuple[Checkpoint, ...]
    vae: Checkpoint
    text: Checkpoint | None
    tokenizer: Tokenizer | None
    clip: Checkpoint | None
    tiny: Checkpoint | None = None


def open_files(
    dit: Sequence[Checkpoint],
    *,
    vae: str | None = None,
    text: str | None = None,
    tokenizer: str | None = None,
    clip: str | None = None,
    tiny: str | None = None,
    decoder: str = "full",
    model_size: str | None = None,
) -> WanFiles:
    """Opens what belongs to a DiT, or to Wan2.2's two, with the tiny autoencoder if the decoder is "tiny"; what is not
    named is looked for beside it and in rCM's folders. All is found before any of it is fetched from the hub, and the
    text encoder, the largest, is fetched last.

    Raises MissingFileError that says where it looked, ArgumentError for a file of another network or size, ValueError
    for networks that do not go together.
    """
    networks = tuple(_checked("dit", network) for network in dit)
    config = networks[0].config
    for network in networks[1:]:
        if found := differences(config, network.config):
            raise ValueError(f"{networks[0].path} and {network.path} differ in size: {', '.join(found)}")
    if model_size is not None:
        _check_size(networks[0], model_size)
    if decoder == "tiny" and config.out_channels != TAEW2_1.z_dim:
        raise ArgumentError(
            f"{{decoder}} is of latents of {TAEW2_1.z_dim} channels; {networks[0].path} has {config.out_channels}",
            decoder=decoder,
        )  # fmt: skip
    near, vaes = _near(networks[0].path), VAES.get(config.out_channels, USUAL["vae"])
    vae_path, text_path = _found("vae", vae, near, vaes), _found("umt5", text, near)
    clip_path = None if config.image_dim is None else _found("clip", clip, near)
    tiny_path = _found("tiny_vae", tiny, near) if decoder == "tiny" else None
    opened_text, opened_tokenizer = open_text(str(text_path), tokenizer)
    opened_vae, opened_clip = _open("vae", vae_path), clip_path and _open("clip", clip_path)
    opened_tiny = tiny_path and _open("tiny_vae", tiny_path)
    for opened in (opened_vae, *([opened_tiny] if opened_tiny else [])):
        if opened.config.z_dim != config.out_channels:
            raise ValueError(
                f"{opened.path} has latents of {opened.config.z_dim} channels, the network {config.out_channels}"
            )
    if opened_text.config.dim != config.text_dim:
        raise ValueError(
            f"{opened_text.path} gives features of width {opened_text.config.dim}, the network takes {config.text_dim}"
        )
    files = WanFiles(networks, opened_vae, opened_text, opened_tokenizer, opened_clip, opened_tiny)
    if files.tokenizer.size > opened_text.config.vocabulary:
        raise ValueError(
            f"{files.tokenizer.path} has {files.tokenizer.size} tokens and {opened_text.path} knows "
            f"{opened_text.config.vocabulary}: it is another encoder's tokenizer"
        )
    return files


def open_encoders(
    vae: str | None, *, text: str | None = None, tokenizer: str | None = None, clip: str | None = None,
    reads_text: bool = True,
) -> WanFiles:  # fmt: skip
    """What is around a network, without one: autoencoder, text encoder and tokenizer where text is read, CLIP where it
    is named. What is not named is looked for beside the autoencoder and in rCM's folders. Raises as `open_files`."""
    vae_path = _found("vae", vae, _near(Path()))
    opened, near, reader, words = _open("vae", vae_path), _near(vae_path), None, None
    if reads_text:
        reader, words = open_text(str(_found("umt5", text, near)), tokenizer)
    return WanFiles((), opened, reader, words, None if clip is None else _open("clip", _found("clip", clip, near)))


def open_text(text: str, tokenizer: str | None = None) -> tuple[Checkpoint, Tokenizer]:
    """A text encoder alone, and its tokenizer: the one that is named, that is in the encoder's own file, or that is
    found beside it. Raises as `open_files`."""
    path = _found("umt5", text, [])
    opened = _open("umt5", path)
    if tokenizer is None and opened.tokenizer is not None:
        return opened, tokenizer_of_bytes(opened.tokenizer.read().tobytes(), opened.path)
    places = [find(tokenizer, "tokenizer_path")] if tokenizer else _tokenizer_places(path)
    return opened, open_tokenizer([_local_tokenizer(place) for place in places])


def _found(kind: str, named: str | None, near: Sequence[Place], names: Sequence[str] = ()) -> Place:
    """Where a network is: in what is named for it, a file or a folder that holds it as it is published, or near.
    names: of the file, where they are not all that a network of its kind may have."""
    if named is None:
        return _find(kind, near, names or USUAL[kind])
    place = find(named, ARGUMENTS[kind])
    inside = [place / name for name in (*names, *USUAL[kind])] if place.is_dir() else []
    return next((path for path in inside if path.exists()), place)


def _open(kind: str, path: Place) -> Checkpoint:
    return _checked(kind, open_checkpoint(path))


def _checked(kind: str, found: Checkpoint) -> Checkpoint:
    if found.network.name != kind:
        wanted = next(network for network in NETWORKS if network.name == kind)
        name = ARGUMENTS[kind]
        raise ArgumentError(f"{{{name}}} is a {found.network.title}, not a {wanted.title}", **{name: found.path})
    found.ours()  # raises for what is missing, left over or misshapen
    return found


def _check_size(network: Checkpoint, model_size: str) -> None:
    wanted, found = dataclasses.asdict(SIZES[model_size]), dataclasses.asdict(network.config)
    names = ("dim", "ffn_dim", "num_heads", "num_layers")
    differ = [f"{n}={found[n]} instead of {wanted[n]}" for n in names if found[n] != wanted[n]]
    if differ:
        raise ArgumentError(f"{network.path} is not of {{model_size}}: {', '.join(differ)}", model_size=model_size)


def _near(path: Place) -> list[Place]:
    """The folder of a file (itself, if it is a folder) and the one above, then rCM's."""
    folder = path if path.is_dir() else path.parent
    return [folder, folder.absolute().parent, *CHECKPOINTS]


def _find(kind: str, folders: Sequence[Place], names: Sequence[str]) -> Place:
    for folder in folders:
        for name in names:
            if (folder / name).exists():
                return folder / name
    title = next(network.title for network in NETWORKS if network.name == kind)
    wan = "Wan2.2" if names[0] == VAES[WAN22_VAE.z_dim][0] else "Wan2.1"
    published = "TAEHV publishes it" if kind == "tiny_vae" else f"{wan} is published with it"
    raise MissingFileError(
        f"no {title}: {', '.join(map(str, folders))} have no {' or '.join(names)}{unreached(*folders)}; name it "
        f"with {{{ARGUMENTS[kind]}}}. {published} as {names[0]}", **{ARGUMENTS[kind]: None},
    )  # fmt: skip


def _tokenizer_places(text: Place) -> list[Place]:
    return [folder / name for folder in _near(text) for name in ("", *TOKENIZERS) if folder / name != Path()]


def _local_tokenizer(place: Place) -> Path:
    """Fetched where it is on the hub and holds a tokenizer."""
    if not isinstance(place, Published) or place.is_file():
        return fetched(place)
    inside = [name for name in FILES if (place / name).is_file()]
    return place.fetch(inside[:1]) if inside else Path(str(place))
