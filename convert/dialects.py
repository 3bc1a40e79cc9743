"""The names that diffusers and transformers give to Wan's weights, as pairs with Wan2.1's own.

The arrays are the same: these tables only rename. `{i}` stands for a number, and what follows a name stays.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from rcm_jax.convert.tensors import Tensor


class Renaming:
    """Pairs (theirs, Wan2.1's), tried in order, each the beginning of a name up to a dot or its end.

    twins: names under which a file may hold the same numbers once more, and those they must be equal to.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], twins: Mapping[str, str] | None = None):
        self.twins = dict(twins or {})
        self._to_wan = [_rule(theirs, wan) for theirs, wan in pairs]
        self._from_wan = [_rule(wan, theirs) for theirs, wan in pairs]

    def wan_name(self, name: str) -> str:
        """Wan2.1's name; a name that no pair knows stays as it is."""
        return _first(self._to_wan, name)

    def to_wan(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by Wan2.1's names. Raises ValueError for two of one name, and for twins that differ."""
        tensors = dict(tensors)
        for twin, name in self.twins.items():
            copy = tensors.pop(twin, None)
            if copy is not None and not _equal(tensors.setdefault(name, copy), copy):
                raise ValueError(f"{twin} must hold the same numbers as {name}, and does not")
        out = {self.wan_name(name): tensor for name, tensor in tensors.items()}
        if len(out) < len(tensors):
            raise ValueError("weights stand under their Wan2.1 names and under others at once")
        return out

    def from_wan(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_first(self._from_wan, name): tensor for name, tensor in tensors.items()}


def _equal(a: Tensor, b: Tensor) -> bool:
    if a is b or (a.shape, a.dtype) != (b.shape, b.dtype):
        return a is b
    pairs = zip(a.blocks(), b.blocks(), strict=True)
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in pairs)


def _rule(pattern: str, replacement: str) -> tuple[re.Pattern, str]:
    pattern = re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(rf"^{pattern}(?=\.|$)"), replacement.replace("{i}", r"\g<i>")


def _first(rules: list[tuple[re.Pattern, str]], name: str) -> str:
    for pattern, replacement in rules:
        new, count = pattern.subn(replacement, name)
        if count:
            return new
    return name


def _dit() -> list[tuple[str, str]]:
    pairs = [
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
        ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
        ("scale_shift_table", "head.modulation"),
        ("proj_out", "head.head"),
        ("blocks.{i}.scale_shift_table", "blocks.{i}.modulation"),
        ("blocks.{i}.norm2", "blocks.{i}.norm3"),
        ("blocks.{i}.ffn.net.0.proj", "blocks.{i}.ffn.0"),
        ("blocks.{i}.ffn.net.2", "blocks.{i}.ffn.2"),
        ("blocks.{i}.attn2.add_k_proj", "blocks.{i}.cross_attn.k_img"),
        ("blocks.{i}.attn2.add_v_proj", "blocks.{i}.cross_attn.v_img"),
        ("blocks.{i}.attn2.norm_added_k", "blocks.{i}.cross_attn.norm_k_img"),
    ]
    parts = [("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"), ("norm_q", "norm_q"), ("norm_k", "norm_k")]
    for theirs, wan in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        pairs += [(f"blocks.{{i}}.{theirs}.{a}", f"blocks.{{i}}.{wan}.{b}") for a, b in parts]
    return pairs


def _vae_rows(stages: int = 4, resnets: int = 3) -> list[tuple[str, str]]:
    """`resnets` and one upsampler a decoder stage: Wan2.1 counts them all in one row, diffusers stage by stage."""
    places = [(f"encoder.down_blocks.{i}", f"encoder.downsamples.{i}") for i in range(stages * resnets)]
    for stage in range(stages):
        row = stage * (resnets + 1)
        places += [(f"decoder.up_blocks.{stage}.resnets.{r}", f"decoder.upsamples.{row + r}") for r in range(resnets)]
        places += [(f"decoder.up_blocks.{stage}.upsamplers.0", f"decoder.upsamples.{row + resnets}")]
    return places


def _vae_stages(resnets: int = 3) -> list[tuple[str, str]]:
    """Wan2.2: both count stage by stage, and have one resnet less in the encoder's."""
    places = []
    for half, way, count in (("encoder", "down", resnets - 1), ("decoder", "up", resnets)):
        theirs, wan = f"{half}.{way}_blocks.{{i}}", f"{half}.{way}samples.{{i}}.{way}samples"
        places += [(f"{theirs}.resnets.{r}", f"{wan}.{r}") for r in range(count)]
        places += [(f"{theirs}.{way}sampler", f"{wan}.{count}")]
    return places


def _vae(places: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """places: of the layers of its levels, by their names and by Wan's."""
    places = list(places)
    for side in ("encoder", "decoder"):
        places += [(f"{side}.mid_block.resnets.{r}", f"{side}.middle.{2 * r}") for r in (0, 1)]
    inside = [
        ("norm1", "residual.0"), ("conv1", "residual.2"), ("norm2", "residual.3"), ("conv2", "residual.6"),
        ("conv_shortcut", "shortcut"), ("resample", "resample"), ("time_conv", "time_conv"),
    ]  # fmt: skip
    pairs = [(f"{theirs}.{a}", f"{wan}.{b}") for theirs, wan in places for a, b in inside]
    for side in ("encoder", "decoder"):
        pairs += [
            (f"{side}.mid_block.attentions.0", f"{side}.middle.1"), (f"{side}.conv_in", f"{side}.conv1"),
            (f"{side}.norm_out", f"{side}.head.0"), (f"{side}.conv_out", f"{side}.head.2"),
        ]  # fmt: skip
    return [*pairs, ("quant_conv", "conv1"), ("post_quant_conv", "conv2")]


class VaeNames(Renaming):
    """diffusers' names for Wan2.1's autoencoder and for Wan2.2's, which mean other places in the same row of numbers:
    the layers that only the second has, by either's names, tell which it is."""

    def __init__(self, first: Renaming, residual: Renaming):
        super().__init__([])
        self._first, self._residual = first, residual

    def _of(self, tensors: Mapping[str, Tensor]) -> Renaming:
        signs = ("encoder.down_blocks.0.resnets.", "encoder.downsamples.0.downsamples.")
        return self._residual if any(name.startswith(signs) for name in tensors) else self._first

    def to_wan(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._of(tensors).to_wan(tensors)

    def from_wan(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._of(tensors).from_wan(tensors)


def _umt5() -> list[tuple[str, str]]:
    attention, ffn = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
    return [
        ("shared", "token_embedding"),
        *((f"{attention}.SelfAttention.{part}", f"blocks.{{i}}.attn.{part}") for part in "qkvo"),
        (f"{attention}.SelfAttention.relative_attention_bias", "blocks.{i}.pos_embedding.embedding"),
        (f"{attention}.layer_norm", "blocks.{i}.norm1"),
        (f"{ffn}.DenseReluDense.wi_0", "blocks.{i}.ffn.gate.0"),
        (f"{ffn}.DenseReluDense.wi_1", "blocks.{i}.ffn.fc1"),
        (f"{ffn}.DenseReluDense.wo", "blocks.{i}.ffn.fc2"),
        (f"{ffn}.layer_norm", "blocks.{i}.norm2"),
        ("encoder.final_layer_norm", "norm"),
    ]


LEADING = {"visual.cls_embedding": 2, "visual.pos_embedding": 1}  # axes of length 1 that Wan2.1's have


class ClipNames(Renaming):
    """transformers keeps q, k and v apart, and its embeddings without leading axes. Its CLIPVisionModel has neither
    projection nor text tower."""

    def to_wan(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = super().to_wan(tensors)
        for name, axes in LEADING.items():
            if name in out:
                out[name] = out[name].apply(lambda x, axes=axes: x[(None,) * axes])
        for q in [name for name in out if ".attn.q." in name]:
            parts = [q, q.replace(".attn.q.", ".attn.k."), q.replace(".attn.q.", ".attn.v.")]
            if all(part in out for part in parts):
                out[q.replace(".attn.q.", ".attn.to_qkv.")] = Tensor.concatenate([out.pop(part) for part in parts])
        return out

    def from_wan(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, tensor in tensors.items():
            if ".attn.to_qkv." in name:
                for i, part in enumerate("qkv"):
                    third = tensor.apply(lambda x, i=i: x[i * len(x) // 3 : (i + 1) * len(x) // 3])
                    out[name.replace("to_qkv", part)] = third
            elif name in LEADING:
                out[name] = tensor.apply(lambda x, axes=LEADING[name]: x[(0,) * axes])
            elif name.startswith("visual.") and not name.startswith("visual.head"):
                out[name] = tensor
        return {f"vision_model.{name}": tensor for name, tensor in super().from_wan(out).items()}


def _clip() -> list[tuple[str, str]]:
    theirs, wan = "encoder.layers.{i}", "visual.transformer.{i}"
    return [
        ("embeddings.class_embedding", "visual.cls_embedding"),
        ("embeddings.patch_embedding", "visual.patch_embedding"),
        ("embeddings.position_embedding.weight", "visual.pos_embedding"),
        ("pre_layrnorm", "visual.pre_norm"),
        ("post_layernorm", "visual.post_norm"),
        *((f"{theirs}.self_attn.{part}_proj", f"{wan}.attn.{part}") for part in "qkv"),
        (f"{theirs}.self_attn.out_proj", f"{wan}.attn.proj"),
        (f"{theirs}.layer_norm1", f"{wan}.norm1"),
        (f"{theirs}.layer_norm2", f"{wan}.norm2"),
        (f"{theirs}.mlp.fc1", f"{wan}.mlp.0"),
        (f"{theirs}.mlp.fc2", f"{wan}.mlp.2"),
    ]


DIFFUSERS_DIT = Renaming(_dit())
DIFFUSERS_VAE = VaeNames(Renaming(_vae(_vae_rows())), Renaming(_vae(_vae_stages())))
TRANSFORMERS_UMT5 = Renaming(_umt5(), twins={"encoder.embed_tokens.weight": "shared.weight"})
TRANSFORMERS_CLIP = ClipNames(_clip())
