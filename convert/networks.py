"""The networks that the converter knows: how their files are told apart, and how sizes are read from shapes."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from rcm_jax.convert import dialects, dit
from rcm_jax.convert.table import Layout, Row
from rcm_jax.convert.tensors import Tensor
from rcm_jax.training.model_file import abstract_network
from rcm_jax.wan import config as sizes

Shapes = Mapping[str, tuple[int, ...]]
DTYPES = ("keep", "bfloat16", "float32")
HEAD_DIM = 128  # of every published DiT; shapes do not tell it


@dataclasses.dataclass(frozen=True)
class Network:
    """One kind of network.

    signs: for each dialect, names that no other network has; any of them is enough. renamings: dialects whose names
    differ from Wan2.1's. read_config: takes shapes by Wan2.1's names, config.json or {}, heads or None. models: the
    published sizes that `--model` names. full_precision: parts that stay float32 when weights are rounded. library:
    the dialect, the file name and the config.json of the folder that diffusers or transformers load.
    """

    name: str
    title: str
    signs: Mapping[str, tuple[str, ...]]
    renamings: Mapping[str, dialects.Renaming]
    rows: Callable[[Any], list[Row]]
    layouts: Callable[[Any], Mapping[str, Layout]]
    read_config: Callable[[Shapes, Mapping[str, Any], int | None], Any]
    models: Mapping[str, Any]
    full_precision: re.Pattern
    library: tuple[str, str, Callable[[Any], dict[str, Any]]]

    def num_layers(self, config: Any) -> int:
        return getattr(config, "num_layers", 1)

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """What our tree has at each path."""
        return {"/".join(path): leaf.shape for path, leaf in flatten_dict(abstract_network(config)).items()}

    def keeps_float32(self, name: str) -> bool:
        return bool(self.full_precision.search(name))


def with_dtype(tensors: Mapping[str, Tensor], dtype: str, network: Network) -> dict[str, Tensor]:
    """By our names: floats in `dtype`, or as they are for "keep". With bfloat16 the parts that are computed with in
    float32 (modulation, norms, time, head) stay float32."""

    def one(name: str, tensor: Tensor) -> Tensor:
        if dtype == "keep" or tensor.dtype.kind not in "fV":  # V: bfloat16 and the small floats
            return tensor
        return tensor.astype("float32" if network.keeps_float32(name) else dtype)

    return {name: one(name, tensor) for name, tensor in tensors.items()}


def need(shapes: Shapes, name: str) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from."""
    if name not in shapes:
        raise ValueError(f"weights do not fit the network: {name}, which its size is read from, is missing")
    return shapes[name]


def count_layers(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number at `{i}` in the names."""
    rule = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
    return 1 + max((int(found[1]) for found in map(rule.match, shapes) if found), default=-1)


def dit_config(shapes: Shapes, config: Mapping[str, Any], num_heads: int | None) -> sizes.DiTConfig:
    """Sizes of a DiT. Heads are told by the caller, by a config.json, or are 128 wide."""
    patch = need(shapes, "patch_embedding.weight")
    patch_size = patch[2:] if len(patch) == 5 else (1, 2, 2)
    numbers = math.prod(patch_size)
    dim = patch[0]
    if not str(config.get("_class_name")).startswith("Wan"):  # of another network in the same folder
        config = {}
    heads = num_heads or config.get("num_heads") or config.get("num_attention_heads") or dim / HEAD_DIM
    if heads < 1 or dim % heads:
        raise ValueError(f"{dim=} does not divide into {heads:g} heads; say how many there are with --num_heads")
    return sizes.DiTConfig(
        dim=dim,
        ffn_dim=need(shapes, "blocks.0.ffn.0.weight")[0],
        num_heads=int(heads),
        num_layers=count_layers(shapes, "blocks.{i}."),
        in_channels=patch[1] if len(patch) == 5 else patch[1] // numbers,
        out_channels=need(shapes, "head.head.weight")[0] // numbers,
        patch_size=patch_size,
        freq_dim=need(shapes, "time_embedding.0.weight")[1],
        text_dim=need(shapes, "text_embedding.0.weight")[1],
        text_len=config.get("text_len", 512),
        image_dim=shapes["img_emb.proj.1.weight"][1] if "img_emb.proj.1.weight" in shapes else None,
        dtype="bfloat16",
    )


def dit_library_config(c: sizes.DiTConfig) -> dict[str, Any]:
    """The config.json of diffusers' WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(c.patch_size),
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.head_dim,
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "text_dim": c.text_dim,
        "freq_dim": c.freq_dim,
        "ffn_dim": c.ffn_dim,
        "num_layers": c.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": c.eps,
        "image_dim": c.image_dim,
        "added_kv_proj_dim": None if c.image_dim is None else c.dim,
        "rope_max_seq_len": 1024,
    }


DIT_MODELS = {
    "t2v-1.3B": sizes.WAN_1_3B,
    "t2v-14B": sizes.WAN_14B,
    "i2v-14B": sizes.WAN_14B_I2V,
    "wan2.2-t2v-A14B": sizes.WAN22_A14B_T2V,
    "wan2.2-i2v-A14B": sizes.WAN22_A14B_I2V,
}
NETWORKS = (
    Network(
        name="dit",
        title="diffusion transformer",
        signs={
            "wan": ("blocks.0.self_attn.q.weight", "time_projection.1.weight", "head.head.weight"),
            "diffusers": ("blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight"),
        },
        renamings={"diffusers": dialects.DIFFUSERS_DIT},
        rows=dit.rows,
        layouts=dit.layouts,
        read_config=dit_config,
        models=DIT_MODELS,
        full_precision=re.compile(r"(^|/)(time_|modulation|norm|image_norm|head/)"),
        library=("diffusers", "diffusion_pytorch_model.safetensors", dit_library_config),
    ),
)
MODELS = {name: (network, config) for network in NETWORKS for name, config in network.models.items()}
