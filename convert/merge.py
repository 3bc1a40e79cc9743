"""Adding to a network: a student's difference from its base, or LoRA files. In float32, one tensor at a time."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rcm_jax.convert.checkpoint import Checkpoint
from rcm_jax.convert.lora import Lora, parse_lora
from rcm_jax.convert.tensors import Tensor

Float32 = np.float32


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
    (lora, problems), tensors = parse_lora(path), base.wan()
    problems += [line for module, parts in lora.modules.items() for line in _misfits(module, parts, tensors)]
    if problems:
        raise ValueError(f"{path} does not fit {base.path}:\n  " + "\n  ".join(problems))
    for module in lora.modules:
        for kind in ("weight", "bias"):
            change = _change(lora, module, kind, scale)
            if change is not None:
                tensors[f"{module}.{kind}"] = _plus(tensors[f"{module}.{kind}"], change)
    return dataclasses.replace(base, tensors=tensors)


def _misfits(module: str, parts: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    if not any(name.rpartition(".")[0] == module for name in own):
        return [f"{t.origin or module} {t.shape} is not known" for t in parts.values()]
    out = []
    if "up" in parts and "down" in parts:
        up, down = parts["up"].shape, parts["down"].shape
        shape = own[f"{module}.weight"].shape if f"{module}.weight" in own else None
        if len(up) != 2 or len(down) != 2 or (up[0], down[1]) != shape or up[1] != down[0]:
            out.append(f"{module}: up {up} times down {down} is not {shape}")
    for kind in ("weight", "bias"):
        target = own.get(f"{module}.{kind}")
        if kind in parts and (target is None or target.shape != parts[kind].shape):
            out.append(f"{module}.{kind}: {parts[kind].shape} in the LoRA, {target and target.shape} in the base")
    return out


def _change(lora: Lora, module: str, kind: str, scale: float) -> Any:
    """A function that computes what is added to a module's weight or bias; None where nothing is."""
    parts = lora.modules[module]
    if kind not in parts and not (kind == "weight" and "up" in parts):
        return None

    def change() -> np.ndarray:
        total = parts[kind].load().astype(Float32) if kind in parts else Float32(0)
        if kind == "weight" and "up" in parts:
            up, down = (parts[half].load().astype(Float32) for half in ("up", "down"))
            total = total + Float32(lora.alpha_of(module) / lora.rank_of(module)) * (up @ down)
        return Float32(scale) * total

    return change
