"""The text that guidance leads away from, for batches that come with embeddings instead of words.

The published recipes take the embedding of Wan's standard negative prompt. Zeros would be another input of the teacher,
which it never saw, so there is no default.
"""

import numpy as np
from jaxtyping import Float

from rcm_jax.convert.files import read_tensor
from rcm_jax.data.config import DataConfig
from rcm_jax.finite import check_finite
from rcm_jax.hub import find
from rcm_jax.wan.config import DiTConfig
from rcm_jax.worlds import toy
from rcm_jax.worlds.wan.files import open_text
from rcm_jax.worlds.wan.negative import PROMPT
from rcm_jax.worlds.wan.text import encode_prompts

TOY = "toy"


def open_null_text(
    data: DataConfig, model: DiTConfig, *, text_encoder: str = "", tokenizer: str = ""
) -> Float[np.ndarray, "L D"]:
    """Of the file `data.null_text`, a bare tensor of at most text_len features; without one, of Wan's negative prompt
    by the text encoder; "toy" is the built-in world's, which is zeros there. Float32, zeros after the text.

    Raises ValueError where there is neither, and for a file that holds something else.
    """
    if data.null_text == TOY:
        features = toy.encode_text([""])[0]
        if features.shape != (model.text_len, model.text_dim):
            raise ValueError(f"data.null_text='toy' is {features.shape}, and the network reads other texts")
        return features
    if data.null_text:
        path = find(data.null_text, "data.null_text")
        if not path.exists():
            raise FileNotFoundError(f"data.null_text: there is no file at {path}")
        try:
            features = read_tensor(path).astype("float32").read()
        except ValueError as error:
            raise ValueError(f"data.null_text: {error}") from error
        return _checked(features, model, f"data.null_text={data.null_text}")
    if not text_encoder:
        raise ValueError(
            f"data.null_text is empty, and data.name={data.name!r} has no words to make it from: give the embedding of "
            "the negative prompt (a tensor [tokens, width] in .pt, .safetensors or .npy; Wan's is published as "
            "umT5_wan_negative_emb.pt), or a text encoder to compute it with (previews.text_encoder)"
        )
    encoder, words = open_text(text_encoder, tokenizer or None)
    features = encode_prompts(encoder, *words([PROMPT]), dtype="bfloat16")[0].astype(np.float32)
    return _checked(features, model, f"the negative prompt's features by {encoder.path}")


def _checked(features: np.ndarray, model: DiTConfig, name: str) -> Float[np.ndarray, "L D"]:
    length, width = model.text_len, model.text_dim
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(f"{name} must be [tokens, {width}], as the network reads texts; it is {features.shape}")
    if not features.any():
        raise ValueError(f"{name} is all zeros, which is no text: the network was never shown it")
    if features[length:].any():
        raise ValueError(f"{name} has {len(features)} tokens, and the network reads {length}")
    features = check_finite(features[:length], name)
    return np.pad(features, ((0, length - len(features)), (0, 0)))
