"""The features of prompts, kept in files of their own: text, and no latents yet."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rcm_jax.data.prepare.options import SetOptions
from rcm_jax.data.prepare.sets import MANIFEST, Form, Plan, ShardSet, digest_of, key_of
from rcm_jax.data.prepare.text import Encode, cut_to_length, features
from rcm_jax.data.shard_files import ShardRecord
from rcm_jax.errors import ArgumentError
from rcm_jax.outputs import unfinished
from rcm_jax.worlds.prompts_file import read_prompts_file
from rcm_jax.worlds.wan.files import open_text
from rcm_jax.worlds.wan.text import encode_prompts

NEGATIVE = "negative.safetensors"
STORED = ml_dtypes.bfloat16


@dataclasses.dataclass(frozen=True)
class PromptText:
    """A prompt and its features, without the zeros after them."""

    key: str
    text: Shaped[np.ndarray, "l D"]
    prompt: str

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return {"text": self.text}


def write_texts(path: Path, texts: Iterable[PromptText]) -> ShardRecord:
    """A safetensors file: features by keys, prompts by keys in the metadata."""
    found = list(texts)
    with unfinished(path) as new:
        save_file({t.key: t.text for t in found}, new, {"prompts": json.dumps({t.key: t.prompt for t in found})})
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardRecord(path.name, len(found), path.stat().st_size, digest)


def read_texts(path: Path) -> list[tuple[str, str]]:
    """Keys and prompts of a file. Raises ValueError for one that is not whole, or another's."""
    try:
        with safe_open(path, "numpy") as file:
            prompts = json.loads((file.metadata() or {})["prompts"])
            if set(prompts) != set(file.keys()):
                raise ValueError("its prompts are not those of its features")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no file of prompts: {error}") from error
    return sorted(prompts.items())


def read_features(path: Path, key: str) -> Shaped[np.ndarray, "l D"]:
    with safe_open(path, "numpy") as file:
        return file.get_tensor(key)


def _whole(path: Path) -> tuple[str, ...] | None:
    try:
        return tuple(key for key, _ in read_texts(path))
    except ValueError:
        return None


def _first(path: Path) -> dict[str, np.ndarray]:
    return {"text": read_features(path, read_texts(path)[0][0])}


TEXTS = Form("text-{:06d}.safetensors", write_texts, _whole, _first)


def make_prompts(file: Path, options: SetOptions, text_encoder: str, tokenizer: str | None, negative: str) -> str:
    """Raises ArgumentError for a file that is none of prompts, and as `open_text`."""
    prompts = read_prompts_file(file, "prompts")
    encoder, words = open_text(text_encoder, tokenizer)
    settings = {"text_encoder": encoder.path, "negative_prompt": negative}
    size = 2 * 512 * encoder.config.dim
    texts = ShardSet(options, Plan("prompts", settings, len(prompts), digest_of(prompts), size), TEXTS)

    def encode(some: list[str]) -> np.ndarray:
        return encode_prompts(encoder, *words(some), dtype="bfloat16")

    rows = features(encode, [prompts[number] for number in texts.order])

    def samples(numbers: range) -> Iterator[PromptText]:
        return (PromptText(key_of(number), next(rows), prompts[number]) for number in numbers)

    told = texts.make(samples, "prompts")
    keep_negative(options, encode, negative)
    return told


def keep_negative(options: SetOptions, encode: Encode, words: str) -> None:
    """Beside the set, by its first process: the text that guidance leads away from, as `data.null_text` reads it."""
    path = options.out / NEGATIVE
    if options.process == 0 and not path.exists():
        with unfinished(path) as new:
            save_file({"text": cut_to_length(encode([words])[0]).astype(STORED)}, new)


class Prompts(NamedTuple):
    """words: in the order of their keys. features: gives those of one, where a folder has them."""

    words: list[str]
    features: Callable[[int], Shaped[np.ndarray, "l D"]] | None = None


def open_prompts(path: Path) -> Prompts:
    """Of a file, one a line, or of a folder that `make_prompts` made. Raises ArgumentError for what is neither, and for
    a folder whose makers have not ended."""
    if not path.is_dir():
        return Prompts(read_prompts_file(path, "prompts"))
    found = [(file, key, words) for file in sorted(path.glob("text-*.safetensors")) for key, words in read_texts(file)]
    if not found:
        raise ArgumentError("{prompts} is a folder in which there are no prompts", prompts=path)
    for number, (_, key, _) in enumerate(found):
        if key != key_of(number):
            raise ArgumentError(f"{{prompts}} lacks prompt {key_of(number)}: not all of it is made yet", prompts=path)
    if not (path / MANIFEST).is_file():
        raise ArgumentError(f"{{prompts}} has no {MANIFEST}: not all of it is made yet", prompts=path)
    return Prompts([words for *_, words in found], lambda number: read_features(*found[number][:2]))
