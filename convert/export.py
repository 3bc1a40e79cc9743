"""Networks on their way back: Wan2.1's files, rCM's, and the folders of diffusers and transformers."""

import json
from pathlib import Path

from einops import rearrange

from rcm_jax.convert.checkpoint import Checkpoint
from rcm_jax.convert.output import FORMS, check_form, unfinished, write_shards
from rcm_jax.convert.tensors import Tensor, total_bytes
from rcm_jax.convert.torch_io import write_torch
from rcm_jax.progress import byte_bar
from rcm_jax.tensor_stream import write_safetensors

SHARDS = "diffusion_pytorch_model.safetensors"  # as Wan2.1's own folders call theirs
TARGETS = ("wan", "rcm", "diffusers", "transformers")


def their_tensors(source: Checkpoint, target: str, dtype: str = "keep") -> dict[str, Tensor]:
    """The network by the names and in the layouts of `target`. Raises ValueError where that has no such network."""
    network = source.network
    if not network.whole:
        raise ValueError(f"our {network.title} lacks what Wan does not use of it: take the file that it was made from")
    tensors = source.wan(dtype)
    if target == "wan":
        return tensors
    if target == "rcm" and network.name == "dit":
        linear = tensors["patch_embedding.weight"].apply(lambda x: rearrange(x, "d c pt ph pw -> d (c pt ph pw)"))
        flat = {"patch_embedding.weight": linear}
        return {f"net.{name}": tensor for name, tensor in (tensors | flat).items()}
    library = [] if network.library is None else [network.library.dialect]
    if target in library:
        return network.renamings[target].from_wan(tensors)
    valid = ["wan", *(["rcm"] if network.name == "dit" else []), *library]
    raise ValueError(f"{target!r} has no {network.title}; export it to one of {valid}")


def export(
    source: Checkpoint, path: Path, target: str, *, dtype: str = "keep", overwrite: bool = False,
    shard_size: int | None = None,
) -> None:  # fmt: skip
    """Writes a `.safetensors`, `.pt` or `.pth` file for "wan" and "rcm", else the folder that `from_pretrained` takes.
    With a `shard_size` in bytes all are folders, of files up to that size.

    Raises ValueError for what `target` does not have and for another suffix, and as `output.unfinished`.
    """
    tensors, library = their_tensors(source, target, dtype), source.network.library
    check_form(path, target, shards=shard_size is not None)
    size = total_bytes(tensors)
    with unfinished(path, size, overwrite=overwrite) as new, byte_bar(path.name, size) as advance:
        if not FORMS[target] or shard_size is not None:
            new.mkdir()
            if not FORMS[target]:
                (new / "config.json").write_text(json.dumps(library.config(source.config), indent=2) + "\n")
            file = SHARDS if FORMS[target] else library.file
            write_shards(new, file, tensors, shard_size or size, advance)
        elif path.suffix == ".safetensors":
            write_safetensors(new, tensors, {"format": "pt"}, advance)
        else:
            write_torch(new, tensors, advance)
