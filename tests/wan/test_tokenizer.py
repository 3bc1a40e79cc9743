"""Prompts become the same ids whichever file the tokenizer is in."""

import sys

import numpy as np
import pytest

from rcm_jax.wan.tokenizer import clean_prompt, open_tokenizer
from tests.wan.tiny import write_sentencepiece, write_tokenizer

WRITERS = {"tokenizer.json": write_tokenizer, "spiece.model": write_sentencepiece}


@pytest.fixture(scope="module", params=WRITERS)
def tokenizer(request, tmp_path_factory):
    return open_tokenizer([WRITERS[request.param](tmp_path_factory.mktemp("tokenizer"))])


def test_prompts_are_cleaned():
    assert clean_prompt("  a \n cat\t on&amp;amp;off ") == "a cat on&off"
    assert clean_prompt("caf\u00c3\u00a9") == "caf\u00e9"
    assert clean_prompt("a\u00a0fox") == "a fox"


def test_ids_end_and_are_padded(tokenizer):
    ids, mask = tokenizer(["a red fox", "", "two dogs"])
    assert ids.shape == mask.shape == (3, 512)
    for row, seen in zip(ids, mask, strict=True):
        n = seen.sum()
        assert seen[:n].all()
        assert row[n - 1] == 1
        assert not row[n:].any()
    assert mask[1].sum() == 1
    assert (ids[0, : mask[0].sum() - 1] > 3).all()  # known pieces, none of the special ones


def test_cleaning_comes_first_and_long_prompts_keep_their_end(tokenizer):
    np.testing.assert_array_equal(tokenizer(["a  red\nfox "])[0], tokenizer(["a red fox"])[0])
    whole, _ = tokenizer(["a red fox in the snow"], 40)
    short, mask = tokenizer(["a red fox in the snow"], 4)
    assert short.tolist() == [[*whole[0, :3], 1]]
    assert mask.all()


def test_the_pieces_are_the_librarys(tmp_path):
    import sentencepiece
    import tokenizers

    text = "a red fox in the snow"
    file = write_tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(file)).encode(text).ids
    assert open_tokenizer([tmp_path]).pieces(text) == theirs  # this tokenizer.json adds nothing of its own
    file = write_sentencepiece(tmp_path / "s")
    assert open_tokenizer([file]).pieces(text) == sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(
        text
    )


def test_a_tokenizer_json_that_ends_prompts_itself_is_not_ended_twice(tmp_path):
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    file = write_tokenizer(tmp_path)
    plain = open_tokenizer([file]).pieces("a red fox in the snow")
    found = tokenizers.Tokenizer.from_file(str(file))
    found.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    found.enable_truncation(5)
    found.enable_padding(length=9)
    found.save(str(file))
    ids, mask = open_tokenizer([file])(["a red fox in the snow"])
    assert ids[0, : mask[0].sum()].tolist() == [*plain, 1]
    assert len(plain) > 5


def test_what_is_missing_or_broken_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"spiece\.model.*google/umt5-xxl.*with tokenizer_path"):
        open_tokenizer([tmp_path])
    for name in WRITERS:
        (tmp_path / name).write_text("nothing")
        with pytest.raises(ValueError, match=f"{name} is not a"):
            open_tokenizer([tmp_path / name])
    file = write_tokenizer(tmp_path)
    file.write_text(file.read_text().replace("</s>", "<end>"))
    with pytest.raises(ValueError, match="no token </s>"):
        open_tokenizer([file])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RuntimeError, match=r"tokenizers: pip install 'rcm_jax\[wan\]'"):
        open_tokenizer([file])
