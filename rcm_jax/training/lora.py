"""LoRA: a product of two thin factors learned beside each of some linear layers, while the network itself stays put.

    y = x W + b + (alpha / rank) · (x down) up            down [in, rank], up [rank, out]

`down` starts random and `up` at zero, so that training starts from the network as it is. The factors are parameters of
a layer beside its kernel (`wan.layers.Dense`): `with_base` puts both into one tree, which any network function takes.
"""

import dataclasses
import fnmatch
import math

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from rcm_jax.convert.dit import linears
from rcm_jax.ranges import at_least, check_settings
from rcm_jax.types import Params
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.layers import LORA_DOWN, LORA_UP
from rcm_jax.wan.networks import abstract_network

EACH_BLOCK = "blocks.{i}."


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """rank 0 trains the whole network. alpha 0 is the rank: the product counts as it is.

    targets: Wan2.1's names of the linear layers that learn, without the block's number, or patterns of them: "ffn.0",
    "self_attn.[qv]", "*_attn.*". The default is all of the blocks.
    """

    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ("self_attn.*", "cross_attn.*", "ffn.*")

    def __post_init__(self):
        targets = self.targets.split(",") if isinstance(self.targets, str) else self.targets
        object.__setattr__(self, "targets", tuple(targets))
        check_settings(self, "lora.", rank=at_least(0), alpha=at_least(0))

    @property
    def strength(self) -> float:
        """Of alpha, which files tell."""
        return self.alpha or float(self.rank)


def layers_of(lora: LoraConfig, model: DiTConfig) -> list[str]:
    """The paths of the layers that learn. Raises ValueError that lists what there is for a target that is none."""
    there = {name.removeprefix(EACH_BLOCK): path for name, path in linears(model).items()}
    chosen = set()
    for target in lora.targets:
        found = fnmatch.filter(there, target)
        if not found:
            raise ValueError(f"lora.targets: the network has no {target!r}; its layers are {', '.join(there)}")
        chosen.update(there[name] for name in found)
    if not chosen:
        raise ValueError(f"lora.targets is empty: name some of {', '.join(there)}")
    return [path for path in there.values() if path in chosen]


def init_lora(lora: LoraConfig, model: DiTConfig, key: Array) -> Params:
    """The factors before the first step, float32: down as PEFT draws it, up zero."""
    kernels, flat = flatten_dict(abstract_network(model), sep="/"), {}
    for path in layers_of(lora, model):
        *layers, width, out = kernels[f"{path}/kernel"].shape
        key, own = jax.random.split(key)
        bound = 1 / math.sqrt(width)
        down = jax.random.uniform(own, (*layers, width, lora.rank), jnp.float32, -bound, bound)
        flat |= {f"{path}/{LORA_DOWN}": down, f"{path}/{LORA_UP}": jnp.zeros((*layers, lora.rank, out))}
    return unflatten_dict(flat, sep="/")


def with_base(base: Params, factors: Params, lora: LoraConfig) -> Params:
    """One tree of a network's parameters and its LoRA, alpha / rank in it. Nothing of the base is copied."""
    scale = lora.strength / lora.rank
    learned = flatten_dict(factors)
    scaled = {name: scale * x if name[-1] == LORA_UP and scale != 1 else x for name, x in learned.items()}
    return unflatten_dict(flatten_dict(base) | scaled)
