"""Adding to a network: a student's difference from its base, or LoRA files. In float32, one tensor at a time."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rcm_jax.convert.checkpoint import Checkpoint
from rcm_jax.convert.dialects import DIFFUSERS_DIT
from rcm_jax.convert.files import open_weights
from rcm_jax.convert.tensors import Tensor

Float32 = np.float32
LORA_PREFIXES = ("base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.")
# ending of a name -> which part of the change it is
LORA_PARTS = {
    ".lora_A.weight": "down", ".lora_A.default.weight": "down", ".lora_down.weight": "down",
    ".lora_B.weight": "up", ".lora_B.default.weight": "up", ".lora_up.weight": "up",
    ".alpha": "alpha", ".diff": "weight", ".diff_b": "bias", ".lora_B.bias": "bias",
}  # fmt: skip


def add_difference(
    base: Checkpoint, student: Checkpoint, reference: Checkpoint, *, scale: float = 1.0, keep: str | None = None
) -> Checkpoint:
    """base + scale · (student − reference), in the base's dtypes: how rCM brings its students to Wan2.2.

    keep: a pattern of Wan2.1 names that stay the base's, for tensors of another shape (`patch_embedding` of an
    image-to-video base). Raises ValueError listing names and shapes that the three do not share.
    """
    networks = {"base": base.wan(), "student": student.wan(), "reference": reference.wan()}
    kept = {name for name in networks["base"] if keep and re.search(keep, name)}
    if keep and not kept:
        raise ValueError(f"--keep {keep!r} matches no tensor of {base.path}")
    problems = []
    for name in sorted(set().union(*networks.values()) - kept):
        shapes = {who: tensors[name].shape if name in tensors else None for who, tensors in networks.items()}
        if len(set(shapes.values())) > 1:
            problems.append(f"{name}: " + ", ".join(f"{who} {shape or 'has none'}" for who, shape in shapes.items()))
    if problems:
        raise ValueError("the networks differ; --keep PATTERN keeps the base's:\n  " + "\n  ".join(problems))

    def one(name: str, tensor: Tensor) -> Tensor:
        if name in kept:
            return tensor
        new, old = networks["student"][name], networks["reference"][name]
        return _plus(tensor, lambda: Float32(scale) * (new.load().astype(Float32) - old.load().astype(Float32)))

    return dataclasses.replace(base, tensors={name: one(name, t) for name, t in networks["base"].items()})


def _plus(tensor: Tensor, change: Any) -> Tensor:
    load = lambda: (tensor.load().astype(Float32) + change()).astype(tensor.dtype)  # noqa: E731
    return dataclasses.replace(tensor, load=load)


def add_lora(base: Checkpoint, path: str | Path, *, scale: float = 1.0) -> Checkpoint:
    """base + scale · (alpha / rank) · up · down for every layer that the LoRA file has, and its full differences.

    Names as diffusers, PEFT, ComfyUI and kohya write them. alpha is the rank where the file does not tell it. Raises
    ValueError listing names that are no part of a LoRA or of the base, halves without the other, and wrong shapes.
    """
    if base.network.name != "dit":
        raise ValueError(f"{base.path} is a {base.network.title}; LoRA files are for the diffusion transformer")
    weights = open_weights(path)
    changes = _read_lora(weights.groups.get("", {}), base, path)
    settings = json.loads(weights.metadata.get("lora_adapter_metadata", "{}"))
    if any(value for name, value in settings.items() if name.endswith(("use_dora", "use_rslora"))):
        raise ValueError(f"{path} is a DoRA or rank-stabilised LoRA, which is not read")
    alpha = next((value for name, value in settings.items() if name.endswith("lora_alpha")), None)
    tensors = base.wan()
    for module, parts in changes.items():
        for kind in ("weight", "bias"):
            name = f"{module}.{kind}"
            change = _change(parts, kind, scale, alpha)
            if change is not None:
                tensors[name] = _plus(tensors[name], change)
    return dataclasses.replace(base, tensors=tensors)


def _read_lora(tensors: Mapping[str, Tensor], base: Checkpoint, path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Module by Wan2.1's name -> its parts, all checked against the base."""
    own = base.wan()
    modules = {name.rpartition(".")[0] for name in own}
    flat_names = {module.replace(".", "_"): module for module in modules}
    changes: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        ending = next((e for e in LORA_PARTS if name.endswith(e)), None)
        module = name.removesuffix(ending or "")
        for prefix in LORA_PREFIXES:
            module = module.removeprefix(prefix)
        if module.startswith("lora_unet_"):
            module = flat_names.get(module.removeprefix("lora_unet_"), module)
        module = DIFFUSERS_DIT.wan_name(module)
        if ending is None or module not in modules:
            problems.append(f"{name} {tensor.shape} is not known")
        elif LORA_PARTS[ending] in changes.setdefault(module, {}):
            problems.append(f"{name} is there twice")
        else:
            changes[module][LORA_PARTS[ending]] = tensor
    for module, parts in changes.items():
        problems += _misfits(module, parts, own)
    if problems or not changes:
        raise ValueError(f"{path} does not fit {base.path}:\n  " + "\n  ".join(problems or ["it has no LoRA"]))
    return changes


def _misfits(module: str, parts: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    out = []
    if ("up" in parts) != ("down" in parts) or ("alpha" in parts and "up" not in parts):
        out.append(f"{module} has {sorted(parts)}, and a LoRA needs up and down")
    elif "up" in parts:
        up, down, shape = parts["up"].shape, parts["down"].shape, own[f"{module}.weight"].shape
        if len(up) != 2 or len(down) != 2 or (up[0], down[1]) != shape or up[1] != down[0]:
            out.append(f"{module}: up {up} times down {down} is not {shape}")
    for kind in ("weight", "bias"):
        target = own.get(f"{module}.{kind}")
        if kind in parts and (target is None or target.shape != parts[kind].shape):
            out.append(f"{module}.{kind}: {parts[kind].shape} in the LoRA, {target and target.shape} in the base")
    return out


def _change(parts: Mapping[str, Tensor], kind: str, scale: float, alpha: float | None) -> Any:
    """A function that computes what is added to a module's weight or bias; None where nothing is."""
    if kind not in parts and not (kind == "weight" and "up" in parts):
        return None

    def change() -> np.ndarray:
        total = parts[kind].load().astype(Float32) if kind in parts else Float32(0)
        if kind == "weight" and "up" in parts:
            up, down = (parts[half].load().astype(Float32) for half in ("up", "down"))
            rank = len(down)
            strength = parts["alpha"].read().item() if "alpha" in parts else rank if alpha is None else alpha
            total = total + Float32(strength / rank) * (up @ down)
        return Float32(scale) * total

    return change
