"""Prompts to umT5's tokens: cleaned, cut into pieces, ended by </s>.

    ids, mask = open_tokenizer([folder])(["a cat"])                       # [B, L] and [B, L], L = 512 at most

The pieces come from a `tokenizer.json` (library tokenizers) or a `spiece.model` (library sentencepiece); the two of
umT5-XXL give the same.
"""

import dataclasses
import html
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Int

from rcm_jax.errors import MissingFileError

FILES = ("tokenizer.json", "spiece.model")
END = "</s>"
LENGTH = 512  # tokens that the DiT attends to


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"reading prompts needs the library {name}: pip install 'rcm_jax[wan]'") from error


def clean_prompt(prompt: str) -> str:
    """Broken encodings mended, HTML entities resolved twice, white space folded: as Wan2.1 was trained."""
    text = _library("ftfy").fix_text(prompt)
    return " ".join(html.unescape(html.unescape(text)).split())


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """pieces: text to ids without any ending. end: the id of </s>. size: ids there are."""

    path: Path
    pieces: Callable[[str], list[int]]
    end: int
    size: int

    def __call__(self, prompts: Sequence[str], length: int = LENGTH) -> tuple[Int[np.ndarray, "B L"], ...]:
        """Ids and mask of `length` tokens; longer prompts are cut so that </s> stays the last."""
        rows = [[*self.pieces(clean_prompt(prompt))[: length - 1], self.end] for prompt in prompts]
        ids, mask = np.zeros((2, len(rows), length), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return ids, mask


def open_tokenizer(places: Sequence[str | Path]) -> Tokenizer:
    """The tokenizer in the first of `places` (files, or folders that hold one) where there is one.

    Raises FileNotFoundError where there is none, ValueError for a file that is no such tokenizer.
    """
    tried = [file for place in map(Path, places) for file in ([place] if place.is_file() else _inside(place))]
    path = next((file for file in tried if file.is_file()), None)
    if path is None:
        raise MissingFileError(
            f"no tokenizer: there is no {' or '.join(map(str, tried))}. It comes with Wan2.1's weights as the folder "
            "google/umt5-xxl (the same as huggingface.co/google/umt5-xxl); name the folder with {tokenizer_path}",
            tokenizer_path=None,
        )
    read = _from_json if path.suffix == ".json" else _from_sentencepiece
    return read(path)


def _inside(folder: Path) -> list[Path]:
    return [folder / name for name in FILES]


def _from_json(path: Path) -> Tokenizer:
    library = _library("tokenizers")
    try:
        found = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
    found.no_truncation()
    found.no_padding()

    def pieces(text: str) -> list[int]:
        return found.encode(text, add_special_tokens=False).ids

    return _checked(Tokenizer(path, pieces, found.token_to_id(END), found.get_vocab_size()))


def _from_sentencepiece(path: Path) -> Tokenizer:
    return tokenizer_of_bytes(path.read_bytes(), path)


def tokenizer_of_bytes(model: bytes, path: Path) -> Tokenizer:
    """Of a SentencePiece model that is in memory; path: where it comes from. Raises ValueError for what is none, or not
    umT5's."""
    library = _library("sentencepiece")
    try:
        found = library.SentencePieceProcessor(model_proto=model)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
    return _checked(Tokenizer(path, found.encode, found.piece_to_id(END), found.get_piece_size()))


def _checked(tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer.end is None or tokenizer.end < 0:
        raise ValueError(f"{tokenizer.path} has no token {END}: it is not umT5's")
    return tokenizer
