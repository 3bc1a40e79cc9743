"""Networks on their way back: Wan2.1's files, rCM's, and the folders of diffusers and transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einops import rearrange

from rcm_jax.convert.checkpoint import Checkpoint
from rcm_jax.convert.output import FORMS, ONE_FILE, check_form, resumed, write_shards
from rcm_jax.convert.tensors import Tensor, total_bytes
from rcm_jax.convert.torch_io import write_torch
from rcm_jax.progress import byte_bar
from rcm_jax.tensor_stream import write_safetensors

TARGETS = ("wan", "rcm", "diffusers", "transformers")


def their_tensors(source: Checkpoint, target: str, dtype: str = "keep") -> dict[str, Tensor]:
    """The network by the names and in the layouts of `target`. Raises ValueError where that has no such network."""
    network = source.network
    tensors = source.whole(dtype)
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
    shard_size: int | None = None, of: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes a `.safetensors`, `.pt` or `.pth` file for "wan" and "rcm", else the folder that `from_pretrained` takes.
    With a `shard_size` in bytes all are folders, of files up to that size. of: see `output.resumed`; a `.pt` or `.pth`
    begins anew.

    Raises ValueError for what `target` does not have and for another suffix, and as `output.unfinished`.
    """
    tensors, library = their_tensors(source, target, dtype), source.network.library
    check_form(path, target, shards=shard_size is not None)
    size = total_bytes(tensors)
    with resumed(path, size, of, overwrite=overwrite) as (new, journal), byte_bar(path.name, size) as advance:
        if not FORMS[target] or shard_size is not None:
            new.mkdir(exist_ok=True)
            if not FORMS[target]:
                (new / "config.json").write_text(json.dumps(library.config(source.config), indent=2) + "\n")
            file = ONE_FILE if FORMS[target] else library.file
            write_shards(new, file, tensors, shard_size or size, advance, journal)
        elif path.suffix == ".safetensors":
            write_safetensors(new, tensors, {"format": "pt"}, advance, journal)
        else:
            write_torch(new, tensors, advance)
