"""The networks that the converter knows: one entry each."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

from flax.traverse_util import flatten_dict

from rcm_jax.convert import clip, dialects, dit, sizes, tiny_vae, umt5, vae
from rcm_jax.convert.tensors import Tensor
from rcm_jax.wan import config as published
from rcm_jax.wan.networks import abstract_network

DTYPES = ("keep", "bfloat16", "float32")
LISTS = ("mean", "std")  # of latents: a number a channel, of no use in a line
NOT_SIZES = ("dtype", "round_time_to", "remat", "unroll", "attention", "eps", "image_first")


@dataclasses.dataclass(frozen=True)
class Library:
    """How diffusers or transformers keep a network: a folder with config.json and this file."""

    dialect: str
    file: str
    config: Callable[[Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Network:
    """One kind of network.

    table: the module with its rows and layouts. signs: for each dialect, names that no other network has; any of them
    is enough. renamings: dialects whose names differ from Wan2.1's. read_config: see `sizes`. models: the published
    sizes that `--model` names. full_precision: parts that stay float32 when weights are rounded. library: None where
    none has it. names: whose its own names are, "wan" as a dialect.
    """

    name: str
    title: str
    table: ModuleType
    signs: Mapping[str, tuple[str, ...]]
    renamings: Mapping[str, dialects.Renaming]
    read_config: Callable[[sizes.Shapes, Mapping[str, Any], int | None], Any]
    models: Mapping[str, Any]
    full_precision: re.Pattern
    library: Library | None
    names: str = "Wan2.1"

    def num_layers(self, config: Any) -> int:
        return getattr(config, "num_layers", 1)

    def dropped(self, config: Any) -> tuple[str, ...]:
        """Beginnings of Wan2.1 names that files have and we do not."""
        return self.table.dropped(config) if hasattr(self.table, "dropped") else ()

    def lacking(self, config: Any, besides: Collection[str]) -> list[str]:
        """Of what we do not compute with, Wan2.1 names that a way back needs and that are not there."""
        needed = self.table.tail(config) if hasattr(self.table, "tail") else ()
        return [name for name in needed if name not in besides]

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """What our tree has at each path."""
        return {path: leaf.shape for path, leaf in flatten_dict(abstract_network(config), sep="/").items()}


def with_dtype(tensors: Mapping[str, Tensor], dtype: str, network: Network) -> dict[str, Tensor]:
    """By our names: floats in `dtype`, or as they are for "keep". With bfloat16 the parts that are computed with in
    float32 (modulation, norms, time, head) stay float32."""

    def one(name: str, tensor: Tensor) -> Tensor:
        if dtype == "keep" or tensor.dtype.kind not in "fV":  # V: bfloat16 and the small floats
            return tensor
        return tensor.astype("float32" if network.full_precision.search(name) else dtype)

    return {name: one(name, tensor) for name, tensor in tensors.items()}


NETWORKS = (
    Network(
        name="dit",
        title="diffusion transformer",
        table=dit,
        signs={
            "wan": ("blocks.0.self_attn.q.weight", "time_projection.1.weight", "head.head.weight"),
            "diffusers": ("blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight"),
        },
        renamings={"diffusers": dialects.DIFFUSERS_DIT},
        read_config=sizes.dit_config,
        models={
            "t2v-1.3B": published.WAN_1_3B,
            "t2v-14B": published.WAN_14B,
            "i2v-14B": published.WAN_14B_I2V,
            "wan2.2-t2v-A14B": published.WAN22_A14B_T2V,
            "wan2.2-i2v-A14B": published.WAN22_A14B_I2V,
            "ti2v-5B": published.WAN22_TI2V_5B,
        },
        full_precision=re.compile(r"(^|/)(time_|modulation|norm|image_norm|head/)"),
        library=Library("diffusers", "diffusion_pytorch_model.safetensors", sizes.dit_library),
    ),
    Network(
        name="vae",
        title="video autoencoder",
        table=vae,
        signs={
            "wan": ("encoder.middle.0.residual.0.gamma", "decoder.middle.0.residual.0.gamma"),
            "diffusers": ("encoder.mid_block.resnets.0.norm1.gamma", "decoder.mid_block.resnets.0.norm1.gamma"),
        },
        renamings={"diffusers": dialects.DIFFUSERS_VAE},
        read_config=sizes.vae_config,
        models={"vae": published.WAN_VAE, "vae2.2": published.WAN22_VAE},
        full_precision=re.compile(r"(^|/)norm"),
        library=Library("diffusers", "diffusion_pytorch_model.safetensors", sizes.vae_library),
    ),
    Network(
        name="tiny_vae",
        title="tiny video autoencoder",
        table=tiny_vae,
        signs={"wan": ("encoder.4.conv.0.weight", "decoder.3.conv.0.weight")},
        renamings={},
        read_config=sizes.tiny_vae_config,
        models={"taew2.1": published.TAEW2_1},
        full_precision=re.compile(r"(?!)"),
        library=None,
        names="TAEHV",
    ),
    Network(
        name="umt5",
        title="umT5 text encoder",
        table=umt5,
        signs={
            "wan": ("blocks.0.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight"),
            "transformers": (
                "encoder.block.0.layer.0.SelfAttention.q.weight",
                "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
            ),
        },
        renamings={"transformers": dialects.TRANSFORMERS_UMT5},
        read_config=sizes.umt5_config,
        models={"umt5-xxl": published.UMT5_XXL},
        full_precision=re.compile(r"(^|/)(norm|position)"),
        library=Library("transformers", "model.safetensors", sizes.umt5_library),
    ),
    Network(
        name="clip",
        title="CLIP image tower",
        table=clip,
        signs={
            "wan": ("visual.cls_embedding", "visual.transformer.0.attn.to_qkv.weight"),
            "transformers": ("embeddings.class_embedding", "pre_layrnorm.weight"),
        },
        renamings={"transformers": dialects.TRANSFORMERS_CLIP},
        read_config=sizes.clip_config,
        models={"clip-vit-h": published.CLIP_VIT_H},
        full_precision=re.compile(r"(^|[/._])norm"),  # also by Wan2.1's names
        library=Library("transformers", "model.safetensors", sizes.clip_library),
    ),
)
MODELS = {name: (network, config) for network in NETWORKS for name, config in network.models.items()}


def short(config: Any) -> str:
    """The sizes of a config in one line."""
    sizes = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_SIZES + LISTS}
    return " ".join(f"{k}={v}" for k, v in sizes.items() if v is not None and v is not False)


def differences(wanted: Any, found: Any) -> list[str]:
    """Sizes in which two configs of one network differ; how a network is computed is not a size."""
    a, b = dataclasses.asdict(wanted), dataclasses.asdict(found)
    return [f"{k}={b[k]} instead of {a[k]}" for k in a if k not in NOT_SIZES and a[k] != b[k]]
