"""How the videos of a folder are made, written beside them: so that no others come among them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm_jax.convert.merge import given_lora
from rcm_jax.outputs import write_first
from rcm_jax.pipelines.about import LORAS, state_of
from rcm_jax.pipelines.options import SamplingOptions
from rcm_jax.pipelines.pipeline import Pipeline
from rcm_jax.pipelines.request import Request
from rcm_jax.vbench.files import read_json, told
from rcm_jax.worlds.builtin import BUILTIN

SETTINGS = "sampling.json"
FORMAT = "rcm_jax.vbench/1"
NAMED = 3  # differences that an error tells


@dataclasses.dataclass(frozen=True)
class Source:
    """What a video is made from: the name of its prompt, the text that is sampled, its image."""

    stem: str
    text: str
    image: Path | None


def settings_of(
    pipe: Pipeline, options: dict[str, Any], request: Request, sources: Sequence[Source], *, augmented: bool
) -> dict[str, Any]:
    """All that decides what a folder's videos are, resolved: so that it is the same however it was asked for, and
    wherever the files lie. options: of a call. request: of the list's first video. sources: of the whole list.

    Raises as a call does."""
    opened, asked = pipe.opened, SamplingOptions(**options)
    policy, images = asked.policy(), [source.image for source in sources if source.image is not None]
    known = {  # what a user may have changed knowingly before what follows from it: an error tells the first few
        "files": dict(_files(pipe)),
        "kind": pipe.info.kind,
        "text": "augmented" if augmented else "original",
        "causal": _causal(pipe, asked),
        "boundary": opened.experts.boundary if len(opened.experts.sources) > 1 else None,
        "lora_skip": opened.options.lora_skip,
        "sampling": dataclasses.asdict(pipe.sampling(**options)),
        "seed": asked.seed,
        "noise_pattern": request.noise_pattern and str(request.noise_pattern),
        "negative_prompt": request.negative_prompts,
        "num_frames": request.num_frames,
        "size": None if asked.adaptive_resolution else request.size,
        "cache_policy": None if policy is None else {"name": type(policy).__name__} | dataclasses.asdict(policy),
        "cache_quant": dataclasses.asdict(asked.cache_quant),
        "decoder": opened.options.decoder,
        "decoder_dtype": None if pipe.world.small else pipe.world.painter.config.dtype,
        "vae_dtype": opened.options.vae_dtype or "float32",
        "vae_tiling": opened.options.vae_tiling,
        "texts": _digest((source.stem, source.text.encode("utf-8", "replace")) for source in sources),
        "images": _digest((s.stem, s.image.read_bytes()) for s in sources if s.image is not None) if images else None,
        "network": {n: value for n, value in dataclasses.asdict(pipe.info).items() if n not in ("kind", "causal")},
    }
    return json.loads(json.dumps(known, default=str))  # as it will be read


def keep_record(folder: Path, settings: Mapping[str, Any], *, begun: bool) -> None:
    """Writes how the folder's videos are made, if nobody has. begun: whether there were videos before this was called.

    Raises ValueError where there are such as were made in another way, or nobody knows how.
    """
    path = folder / SETTINGS
    if begun and not path.exists():
        raise ValueError(f"{folder} has videos of these names and no {SETTINGS} that says how: give another folder")
    text = json.dumps({"format": FORMAT, "settings": settings}, indent=1)
    if not begun and write_first(path, text):
        return
    before = _read(path)
    differences = [f"{name}={told(old)}, not {told(new)}" for name, old, new in _differing(before, settings)]
    if differences:
        more = f" (and {len(differences) - NAMED} more)" if len(differences) > NAMED else ""
        advice = "" if begun else f", or remove {path}, which has no videos yet, if nobody is making them"
        raise ValueError(
            f"{folder} has videos made with {'; '.join(differences[:NAMED])}{more}: give another folder{advice}"
        )


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path)
    settings = found.get("settings") if isinstance(found, dict) and found.get("format") == FORMAT else None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not say how its folder's videos are made: give another folder")
    return settings


def _differing(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs, by names with dots."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*now, *before)):
            yield from _differing(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def _causal(pipe: Pipeline, asked: SamplingOptions) -> dict[str, Any]:
    """The file's settings, with the window and the sink that are asked for."""
    given = {name: value for name in ("window", "sink") if (value := getattr(asked, name)) is not None}
    return {"window": 0, "sink": 0} | pipe.info.causal | given if pipe.causal else {}


def _files(pipe: Pipeline) -> Iterator[tuple[str, Any]]:
    """State of every file by what it is for; of one on the hub, its address."""
    opened = pipe.opened
    for i, source in enumerate(opened.experts.sources):
        yield ("network", "second network")[i], _state(source.path)
    for name in LORAS:
        given = [given_lora(text, name) for text in getattr(opened.options, name) or ()]
        yield name, [{"file": _state(one.path), "strength": one.strength} for one in given]
    if opened.files is not None:
        of = opened.files
        others = {"autoencoder": of.vae, "text encoder": of.text, "tokenizer": of.tokenizer, "image encoder": of.clip,
                  "tiny decoder": of.tiny}  # fmt: skip
        for name, file in others.items():
            yield name, None if file is None else _state(file.path)


def _state(path: Any) -> Any:
    builtin = next((name for name, file in BUILTIN.items() if file == path), None)
    return builtin or state_of(str(path)) or str(path)


def _digest(parts: Iterable[tuple[str, bytes]]) -> str:
    """Of names and bytes, whatever their order."""
    digest = hashlib.sha256()
    for one in sorted(hashlib.sha256(name.encode() + b"\0" + data).digest() for name, data in parts):
        digest.update(one)
    return digest.hexdigest()[:16]
