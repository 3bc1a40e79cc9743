"""LoRA files: what they hold by Wan2.1's names, whoever named it, and writing them as others read them."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rcm_jax.convert import dit
from rcm_jax.convert.dialects import DIFFUSERS_DIT
from rcm_jax.convert.files import Weights, open_weights
from rcm_jax.convert.output import unfinished
from rcm_jax.convert.tensors import Tensor, total_bytes
from rcm_jax.hub import Place
from rcm_jax.model_file import ModelInfo, info_from_json
from rcm_jax.tensor_stream import write_safetensors
from rcm_jax.wan.config import WAN_14B_I2V, DiTConfig
from rcm_jax.wan.layers import LORA_DOWN, LORA_UP

FORMS = ("diffusers", "comfyui", "kohya")
PREFIXES = ("base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.", "model.", "unet.")
KOHYA = "lora_unet_"
DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_A", ".lora_down.weight", "_lora.down.weight",
        ".lora.down.weight", ".lora_linear_layer.down.weight")  # fmt: skip
UP = tuple(name.replace("lora_A", "lora_B").replace("down", "up") for name in DOWN)
# ending of a name -> which part of the change it is
PARTS = {**dict.fromkeys(DOWN, "down"), **dict.fromkeys(UP, "up")} | {
    ".alpha": "alpha", ".diff": "weight", ".diff_b": "bias", ".lora_B.bias": "bias", ".diff_m": "modulation",
}  # fmt: skip
WHOLE = ("weight", "bias", "modulation")  # parts that are differences of a whole parameter
OTHERS = {  # ending of a name -> of what kind of file that is, which is not read
    ".dora_scale": "a DoRA", ".lora_magnitude_vector": "a DoRA", ".lora_mid.weight": "a LoRA with a middle factor",
    ".set_weight": "a set of whole weights", ".reshape_weight": "a LoRA that reshapes weights",
    ".hada_w1_a": "a LoHa", ".hada_w1_b": "a LoHa", ".lokr_w1": "a LoKr", ".lokr_w1_a": "a LoKr", ".lokr_w2": "a LoKr",
    ".a1.weight": "a GLoRA", ".w_norm": "of LyCORIS' norms", ".b_norm": "of LyCORIS' norms", ".oft_blocks": "an OFT",
}  # fmt: skip
ADAPTER, INFO = "lora_adapter_metadata", "rcm_jax_info"  # in a file's metadata: diffusers', and ours
PEFT_SETTINGS = "adapter_config.json"  # beside a file of PEFT's own


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA file. modules: by Wan2.1's names, the parts of each: "down" [rank, in], "up" [out, rank] (of a convolution
    with its kernel's axes behind), "alpha", and differences of its whole "weight", "bias" and "modulation".

    alpha: of the modules that have none of their own; None: the rank. info: of the network that it makes of its base,
    where it says so."""

    path: Place
    modules: Mapping[str, Mapping[str, Tensor]]
    alpha: float | None = None
    info: ModelInfo | None = None

    def __str__(self) -> str:
        ranks = sorted({self.rank_of(module) for module, parts in self.modules.items() if "down" in parts})
        count = sum(t.size for parts in self.modules.values() for t in parts.values())
        of = f", of a {self.info.kind}" if self.info else ""
        ranks = " ".join(map(str, ranks))
        return f"{self.path}: LoRA of {len(self.modules)} layers, rank {ranks}, {count:,} numbers{of}"

    def alpha_of(self, module: str) -> float:
        parts = self.modules[module]
        own = parts["alpha"].read().item() if "alpha" in parts else self.alpha
        return float(self.rank_of(module) if own is None else own)

    def rank_of(self, module: str) -> int:
        return self.modules[module]["down"].shape[0]


def read_lora(path: str | Path) -> Lora:
    """Names as diffusers, PEFT, ComfyUI and kohya write them, no number read. Raises ValueError that lists what is no
    part of a LoRA, and for kinds of LoRA that are not read."""
    lora, problems = parse_lora(path)
    if problems:
        raise ValueError(f"{path} is no LoRA that is read here:\n  " + "\n  ".join(problems))
    return lora


def parse_lora(path: str | Path) -> tuple[Lora, list[str]]:
    """The same, with what is wrong with its names."""
    weights = open_weights(path)
    settings = _settings(weights)
    if any(value for name, value in settings.items() if name.endswith(("use_dora", "use_rslora"))):
        raise ValueError(f"{path} is a DoRA or rank-stabilised LoRA, which is not read")
    alphas = next((value for name, value in settings.items() if name.endswith("alpha_pattern")), {})
    modules: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in weights.groups.get("", {}).items():
        if other := next((kind for ending, kind in OTHERS.items() if name.endswith(ending)), None):
            raise ValueError(f"{path} is {other} ({name}), which is not read")
        ending = next((e for e in PARTS if name.endswith(e)), None)
        module = _wan_module(name.removesuffix(ending or ""))
        if ending is None:
            problems.append(f"{name} {tensor.shape} is not known")
        elif PARTS[ending] in modules.setdefault(module, {}):
            problems.append(f"{name} is there twice")
        else:
            modules[module][PARTS[ending]] = tensor
            for key, alpha in alphas.items() if PARTS[ending] == "up" else ():
                if re.fullmatch(rf"(.*\.)?({key})", name.removesuffix(ending)):
                    modules[module]["alpha"] = Tensor.of(np.float32(alpha))
    for module, parts in modules.items():
        if ("up" in parts) != ("down" in parts) or ("alpha" in parts and "up" not in parts):
            problems.append(f"{module} has {sorted(parts)}, and a LoRA needs up and down")
    if not modules:
        problems.append("it has no LoRA")
    alpha = next((float(value) for name, value in settings.items() if name.endswith("lora_alpha")), None)
    info = weights.metadata.get(INFO)
    return Lora(weights.path, modules, alpha, info_from_json(info) if info else None), problems


def _settings(weights: Weights) -> dict[str, Any]:
    """Of PEFT, as diffusers keeps them in the file, or as PEFT does beside its own."""
    folder = weights.path if weights.path.is_dir() else weights.path.parent
    beside = folder / PEFT_SETTINGS
    if any(name.startswith(PREFIXES[0]) for name in weights.groups.get("", {})) and beside.is_file():
        try:
            return dict(json.loads(beside.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{beside} is not JSON: {error}") from error
    return json.loads(weights.metadata.get(ADAPTER, "{}"))


def _wan_module(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    if name.startswith(KOHYA):
        return _from_underscores(name.removeprefix(KOHYA).removeprefix("_"))
    return DIFFUSERS_DIT.wan_name(name)


@functools.cache
def _underscored() -> list[tuple[re.Pattern, str]]:
    """Names of all modules with `_` for every dot: the largest network has all that any has."""
    modules = dict.fromkeys(row.theirs.rpartition(".")[0] for row in dit.rows(WAN_14B_I2V))
    return [(re.compile(m.replace(".", "_").replace("{i}", r"(\d+)")), m) for m in modules]


def _from_underscores(name: str) -> str:
    found = ((pattern.fullmatch(name), module) for pattern, module in _underscored())
    return next((module.format(i=match[1]) if match.re.groups else module for match, module in found if match), name)


def of_parameters(
    flat: Mapping[str, Tensor], config: DiTConfig, *, alpha: float, info: ModelInfo, path: Place = Path()
) -> Lora:
    """From a run's parameters by our names, {"blocks/ffn_in/lora_down": [layers, in, rank], …}."""
    modules: dict[str, dict[str, Tensor]] = {}
    for theirs, ours in dit.linears(config).items():
        if f"{ours}/{LORA_DOWN}" not in flat:
            continue
        stacked = "{i}" in theirs
        for part, name in (("down", LORA_DOWN), ("up", LORA_UP)):
            whole = flat[f"{ours}/{name}"]
            for i in range(whole.shape[0] if stacked else 1):
                tensor = (whole.layer(i) if stacked else whole).apply(np.transpose)
                modules.setdefault(theirs.format(i=i), {})[part] = tensor
    return Lora(path, modules, alpha, info)


def lora_tensors(lora: Lora, form: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors and its metadata. diffusers': alpha is in the metadata, and where modules differ in rank or
    alpha, in `up`. Raises ValueError for a LoRA that has more than factors."""
    more = sorted(f"{m}: {part}" for m, parts in lora.modules.items() for part in parts if part in WHOLE)
    if more:
        raise ValueError(f"{lora.path} has whole differences, which are not written: {', '.join(more[:4])}")
    metadata = {"format": "pt"} | ({INFO: lora.info.to_json()} if lora.info else {})
    if form == "diffusers":
        return _for_diffusers(lora, metadata)
    tensors = {}
    for module, parts in lora.modules.items():
        name = f"diffusion_model.{module}" if form == "comfyui" else KOHYA + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = parts["down"], parts["up"]
        tensors[f"{name}.alpha"] = Tensor.of(np.float32(lora.alpha_of(module)))
    return tensors, metadata


def _for_diffusers(lora: Lora, metadata: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, kinds = {}, {(lora.rank_of(m), lora.alpha_of(m)) for m in lora.modules}
    theirs = {module: next(iter(DIFFUSERS_DIT.from_wan({module: None}))) for module in lora.modules}
    for module, parts in lora.modules.items():
        up, scale = parts["up"], lora.alpha_of(module) / lora.rank_of(module)
        name = f"transformer.{theirs[module]}"
        tensors[f"{name}.lora_A.weight"] = parts["down"]
        tensors[f"{name}.lora_B.weight"] = up if len(kinds) == 1 else up.apply(functools.partial(_scaled, scale))
    if len(kinds) == 1:
        ((rank, alpha),) = kinds
        told = {"r": rank, "lora_alpha": alpha, "target_modules": _without_blocks(theirs.values())}
        metadata |= {ADAPTER: json.dumps({f"transformer.{key}": value for key, value in told.items()})}
    return tensors, metadata


def _scaled(scale: float, x: np.ndarray) -> np.ndarray:
    return (np.float32(scale) * x.astype(np.float32)).astype(x.dtype)


def _without_blocks(names: Iterable[str]) -> list[str]:
    """As PEFT takes them: ends of names."""
    return sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in names})


def write_lora(
    lora: Lora, path: Path, form: str = "diffusers", *, dtype: str = "keep", overwrite: bool = False
) -> Path:
    """One safetensors file, whole or not at all. Raises as `lora_tensors` and `output.unfinished`."""
    tensors, metadata = lora_tensors(lora, form)
    if dtype != "keep":
        tensors = {name: t if name.endswith(".alpha") else t.astype(dtype) for name, t in tensors.items()}
    with unfinished(path, total_bytes(tensors), overwrite=overwrite) as new:
        write_safetensors(new, tensors, metadata, lambda _: None)
    return path
